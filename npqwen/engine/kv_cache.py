"""Keys and values of the tokens so far, in pages that are added as they are needed."""

from __future__ import annotations

from copy import copy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import ContextLengthError, OptionError, OutOfMemoryError
from npqwen.format.config import Config
from npqwen.format.layout import ceil_div
from npqwen.hardware.machine import HEADROOM, available_memory
from npqwen.kernels.attention import PAGE, TILE, page_items

_ALIGN = 64


class _Pages(NamedTuple):
    """Replaced whole, never changed: so an interrupt never leaves the address of a page that is gone."""

    arrays: list[NDArray[Any]]
    """Each of `page_shape`."""
    addresses: NDArray[np.int64]


class KVCache:
    """The cache of one sequence, PAGE positions a page (kernels/attention.py has the layout).

    A page is allocated zeroed, and the operating system lends memory only for what is written.  Growing never
    copies.  Not safe for two threads at once: give each sequence its own, such as a `fork`.
    """

    def __init__(
        self, config: Config, limit: int, dtype: type[np.float16] | type[np.float32], origin: object = None
    ) -> None:
        self.origin = origin
        """What a model knows its own caches by, their forks too."""
        self.length = 0
        """Tokens whose keys and values are in."""
        self.limit = limit
        """Tokens it may hold."""
        items = page_items(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        self.dtype_array = np.zeros(0, np.uint16 if dtype is np.float16 else np.float32)
        """An array of the pages' dtype, for kernels; they see float16 as its bits."""
        self.page_bytes = items * self.dtype_array.itemsize
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        self.page_shape = (layers, 2, heads, PAGE // TILE, TILE * config.head_dim)
        """Keys and values of TILE positions lie together."""
        self._held = _Pages([], np.zeros(ceil_div(limit, PAGE), np.int64))
        self._shared: set[int] = set()
        """Pages that another cache may hold too: not to be written."""

    @property
    def addresses(self) -> NDArray[np.int64]:
        """Where each page is, for kernels."""
        return self._held.addresses

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more, in pages that no fork shares.

        Raises ContextLengthError if the limit forbids it, OutOfMemoryError if the machine has no memory for it.
        """
        need = self.length + tokens
        if need > self.limit:
            raise ContextLengthError(
                f"{self.length} tokens in the cache and {tokens} more are over the limit of {self.limit}; "
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

    def fork(self, length: int | None = None) -> KVCache:
        """An independent cache with the first `length` tokens (default: all), for the price of one page.

        Full pages are shared; whichever of the two is cut back into one and goes on takes a copy of it then.
        Raises OptionError if there are fewer tokens, OutOfMemoryError if there is no memory for a page.
        """
        length = self.length if length is None else length
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot fork the first {length} tokens of a cache of {self.length}")
        fork = copy(self)
        fork.length = length
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

    def _new_page(self) -> NDArray[Any]:
        try:
            raw = np.zeros(self.page_bytes + _ALIGN, np.uint8)
        except MemoryError:  # a limit of addresses, or a system that promises no more than it has
            raise self._too_large(1, self.length + 1, 0) from None
        start = -raw.ctypes.data % _ALIGN
        return raw[start : start + self.page_bytes].view(self.dtype_array.dtype).reshape(self.page_shape)

    def _check_memory(self, pages: int, need: int) -> None:
        available = available_memory()
        if available is not None and pages * self.page_bytes > available - HEADROOM:
            raise self._too_large(pages, need, available)

    def _too_large(self, pages: int, need: int, available: int) -> OutOfMemoryError:
        fits = (max(0, available - HEADROOM) // self.page_bytes + len(self._held.arrays)) * PAGE
        return OutOfMemoryError(
            f"a cache of {need} tokens takes {pages * self.page_bytes / 1e9:.2f} GB more, {available / 1e9:.2f} GB of "
            f"memory are left, enough for {fits} tokens; shorten the prompt, or close other programs"
        )

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; OptionError if there are fewer."""
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length

    def pages(self, length: int) -> list[NDArray[Any]]:
        """The first `length` positions, in whole tiles: of each page the part they take, to be read or filled."""
        ends = [min(PAGE, length - start) for start in range(0, length, PAGE)]
        return [page[:, :, :, : ceil_div(end, TILE)] for page, end in zip(self._held.arrays, ends, strict=False)]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages there are, shared ones too."""
        return len(self._held.arrays) * self.page_bytes


def _copy_positions(source: NDArray[Any], target: NDArray[Any], count: int) -> None:
    """Copy a page's first positions, in whole tiles."""
    tiles = ceil_div(max(0, count), TILE)
    target[:, :, :, :tiles] = source[:, :, :, :tiles]
