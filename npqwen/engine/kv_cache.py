"""The cache of one sequence: the keys and values that its layers keep of the tokens so far, in pages."""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Iterable
from copy import copy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npqwen.checks import check_whole
from npqwen.errors import ContextLengthError, OptionError, OutOfMemoryError
from npqwen.format.config import Config
from npqwen.format.layout import ceil_div
from npqwen.hardware.machine import HEADROOM, available_memory
from npqwen.kernels.cache_page import PAGE, POSITION_TILE
from npqwen.kernels.paging import advise_huge_pages


class KeysAndValues(NamedTuple):
    """The state of an attention layer: a key and a value per head, for every token."""

    heads: int
    head_dim: int


def layer_states(config: Config) -> list[KeysAndValues]:
    """The state that each layer keeps. All attention layers of a model have the same shape."""
    return [KeysAndValues(config.num_key_value_heads, config.head_dim)] * config.num_hidden_layers


class _Pages(NamedTuple):
    """Replaced as a whole, never changed: an interrupt never leaves the address of a page that was freed."""

    arrays: list[NDArray[Any]]
    """Each of `page_shape`."""
    addresses: NDArray[np.int64]


class _OneThread:
    """Refuses a second thread while one is inside; a context manager. The same thread may enter again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise OptionError("another thread is using this cache; give each thread its own, such as a fork")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class KVCache:
    """Keys and values of one sequence, in pages of PAGE positions (npqwen/kernels/cache_page.py has the layout).

    A page is allocated zeroed, and the operating system provides memory only for what is written. Growing never copies.
    A cache serves one thread at a time (OptionError for a second one); give each sequence its own, such as a `fork`.
    """

    def __init__(
        self, config: Config, limit: int, dtype: type[np.float16] | type[np.float32], origin: object = None
    ) -> None:
        """limit: maximum tokens. origin: identifies the engine that the cache and its forks belong to."""
        self.origin = origin
        self.length = 0
        """Tokens in the cache."""
        self.limit = limit
        """Maximum tokens."""
        self.in_use = _OneThread()
        """Held while the cache is read or changed."""
        states = layer_states(config)
        heads, head_dim = states[0]
        self.page_shape = (len(states), 2, heads, PAGE // POSITION_TILE, POSITION_TILE * head_dim)
        """(layers that keep keys and values, keys or values, heads, tiles, POSITION_TILE positions)."""
        self.dtype_array = np.zeros(0, np.uint16 if dtype is np.float16 else np.float32)
        """An empty array of the pages' dtype: uint16 stands for the bits of float16, as Numba has no float16."""
        self.page_bytes = math.prod(self.page_shape) * self.dtype_array.itemsize
        self._held = _Pages([], np.zeros(ceil_div(limit, PAGE), np.int64))
        self._shared: set[int] = set()
        """Indices of pages that another cache may hold too: they are copied before they are written."""

    def __repr__(self) -> str:
        return f"<KVCache: {self.length} of {self.limit} tokens, {self.nbytes / 1e6:.1f} MB>"

    @property
    def addresses(self) -> NDArray[np.int64]:
        """The address of each page, 0 where there is none yet."""
        return self._held.addresses

    @property
    def held(self) -> object:
        """The owner of the pages that `addresses` leads to: they stay as long as it does."""
        return self._held

    @property
    def page_count(self) -> int:
        """Allocated pages, including shared ones."""
        return len(self._held.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocated pages, including shared ones."""
        return self.page_count * self.page_bytes

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more, in pages that no fork shares.

        Raises ContextLengthError beyond the limit, OutOfMemoryError if the machine has no memory for them.
        """
        with self.in_use:
            need = self.length + check_whole("tokens", tokens)
            if need > self.limit:
                raise ContextLengthError(
                    f"{self.length} tokens in the cache and {tokens} more exceed the limit of {self.limit}; "
                    "shorten the prompt, or raise the context if the model allows more"
                )
            held, end = self._held, ceil_div(need, PAGE)
            written = [i for i in range(self.length // PAGE, end) if i in self._shared or i >= len(held.arrays)]
            if not written:
                return
            self._check_memory(len(written), need)
            arrays, addresses = held.arrays.copy(), held.addresses.copy()
            for i in written:
                page = self._new_page()
                addresses[i] = page.ctypes.data
                if i == len(arrays):
                    arrays.append(page)
                else:
                    _copy_positions(arrays[i], page, self.length - i * PAGE)
                    arrays[i] = page
            self._held = _Pages(arrays, addresses)
            self._shared.difference_update(written)

    def reusable(self, length: int) -> int:
        """How many of the first `length` tokens `truncate` and `fork` can keep.

        Layers that keep keys and values can go back to any length: min(length, self.length).
        """
        return min(check_whole("length", length), self.length)

    def truncate(self, length: int) -> None:
        """Discard all but the first `length` tokens; OptionError if the cache cannot go back to that length."""
        with self.in_use:
            self._check_length(length)
            self.length = int(length)

    def fork(self, length: int | None = None) -> KVCache:
        """An independent cache with the first `length` tokens (default: all). It takes the memory of one page.

        Full pages are shared, and copied by whichever of the two writes to one after a `truncate`. Raises OptionError
        if the cache cannot go back to that length, OutOfMemoryError if there is no memory for a page.
        """
        with self.in_use:
            length = self.length if length is None else length
            self._check_length(length)
            fork = copy(self)
            fork.in_use = _OneThread()
            fork.length = int(length)
            held, full = self._held, length // PAGE
            arrays, addresses = held.arrays[:full], np.zeros_like(held.addresses)
            addresses[:full] = held.addresses[:full]
            if length % PAGE:
                self._check_memory(1, length)
                page = self._new_page()
                _copy_positions(held.arrays[full], page, length % PAGE)
                arrays.append(page)
                addresses[full] = page.ctypes.data
            fork._held = _Pages(arrays, addresses)
            fork._shared = set(range(full))
            self._shared |= fork._shared
            return fork

    def pages(self, length: int) -> list[NDArray[Any]]:
        """Views of the first `length` positions, rounded up to whole tiles: of each page the tiles they take."""
        ends = [min(PAGE, length - start) for start in range(0, length, PAGE)]
        pages = zip(self._held.arrays, ends, strict=False)
        return [page[:, :, :, : ceil_div(end, POSITION_TILE)] for page, end in pages]

    def _check_length(self, length: int) -> None:
        if self.reusable(length) != length:
            raise OptionError(f"length is {length}; the cache has {self.length} tokens")

    def _new_page(self) -> NDArray[Any]:
        try:
            memory = _memory(self.page_bytes)
        except OSError:  # a limit on the address space, or a system that does not overcommit
            raise self._too_large(1, self.length + 1, 0) from None
        return memory.view(self.dtype_array.dtype).reshape(self.page_shape)

    def _check_memory(self, pages: int, need: int) -> None:
        available = available_memory()
        if available is not None and pages * self.page_bytes > available - HEADROOM:
            raise self._too_large(pages, need, available)

    def _too_large(self, pages: int, need: int, available: int) -> OutOfMemoryError:
        fits = (max(0, available - HEADROOM) // self.page_bytes + len(self._held.arrays)) * PAGE
        return OutOfMemoryError(
            f"a cache of {need} tokens needs another {pages * self.page_bytes / 1e9:.2f} GB and "
            f"{available / 1e9:.2f} GB of memory are available, enough for {fits} tokens; "
            "shorten the prompt, or close other programs"
        )


def held_bytes(caches: Iterable[KVCache]) -> int:
    """Bytes of the pages of several caches, shared ones counted once."""
    return sum({id(page): page.nbytes for cache in caches for page in cache._held.arrays}.values())


def _memory(size: int) -> NDArray[np.uint8]:
    """Zeros at a multiple of 4,096 bytes, which the system gets back once no array is left; OSError without room.

    After pages of many lengths of life, malloc would keep a multiple of what is in use: of what has been freed, it
    returns only the end of its heap.
    """
    if sys.platform == "win32":
        mapping = mmap.mmap(-1, size)
    else:
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        advise_huge_pages(mapping)
    return np.frombuffer(mapping, np.uint8)


def _copy_positions(source: NDArray[Any], target: NDArray[Any], count: int) -> None:
    """Copy a page's first `count` positions, rounded up to whole tiles."""
    tiles = ceil_div(max(0, count), POSITION_TILE)
    target[:, :, :, :tiles] = source[:, :, :, :tiles]
