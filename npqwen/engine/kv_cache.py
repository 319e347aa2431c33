"""The cache of one sequence: keys and values of its tokens, in pages, and a hybrid's recurrent states."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from npqwen.checks import check_whole
from npqwen.engine.cache_pages import Pages, page_part, page_shape, tile_positions
from npqwen.engine.cache_type import PAGE_DTYPES, CacheType
from npqwen.engine.hidden_tail import HiddenTail
from npqwen.engine.prefix_page import MIN_PREFIX, Scope, scope_of
from npqwen.engine.recurrent_states import RecurrentShape, RecurrentStates, State
from npqwen.errors import ContextLengthError, OptionError, OutOfMemoryError
from npqwen.format.config import Config
from npqwen.format.layout import ceil_div
from npqwen.hardware.machine import HEADROOM, available_memory, is_too_little
from npqwen.kernels.cache_page import PAGE
from npqwen.kernels.paging import new_memory

if TYPE_CHECKING:
    from npqwen.engine.adapter import Adapter


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

    recurrent: the states of a hybrid's Gated DeltaNet layers; None if all layers are attention.
    """

    def __init__(
        self,
        config: Config,
        limit: int,
        kv: CacheType,
        origin: object = None,
        evict: Callable[[], bool] | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """limit: maximum tokens. kv: the element type. origin: identifies the engine that cache and forks belong to.
        adapter: the LoRA adapter that all its tokens are run with.

        evict: called when there is not enough memory for a page or a state. It evicts something from the pool of
        prefixes, and returns False if the pool is empty.
        """
        self.origin = origin
        self.adapter = adapter
        """The LoRA adapter that its keys and values are computed with; forks have the same one."""
        self._evict = evict or (lambda: False)
        self.length = 0
        """Tokens in the cache."""
        self.limit = limit
        """Maximum tokens."""
        self.in_use = _OneThread()
        """Held while the cache is read or changed."""
        shape = RecurrentShape.of(config)
        self.recurrent = None if shape is None else RecurrentStates(shape)
        self.kv = kv
        """The element type."""
        self.tile = tile_positions(kv)
        """Positions of a tile, the smallest unit in which pages are copied."""
        self.page_shape = page_shape(config, kv)
        """(attention layers, 2 for keys and values, heads, tiles, elements of a tile)."""
        self.page_dtype: np.dtype[Any] = np.dtype(PAGE_DTYPES[kv])
        """uint16 holds the bits of float16."""
        self.page_bytes = math.prod(self.page_shape) * self.page_dtype.itemsize
        self._held = Pages([], np.zeros(ceil_div(limit, PAGE), np.int64))
        self._shared: dict[int, int] = {}
        """By index, how many positions of a page others may share: the page is copied before one of them is written."""
        self.tail: HiddenTail | None = None
        """Receives the hidden states of passes; set by the user of a draft layer, which reads them; forks have none."""
        self.salt = ""
        """Only texts with the same salt share its pages, see the option `cache_salt`; forks have it, too."""
        self.cuts = 0
        """How many times tokens were discarded or replaced; while it is unchanged, tokens were only appended."""

    def __repr__(self) -> str:
        return f"<KVCache: {self.length} of {self.limit} tokens, {self.nbytes / 1e6:.1f} MB>"

    @property
    def addresses(self) -> NDArray[np.int64]:
        """The address of each page, 0 for those not allocated yet."""
        return self._held.addresses

    @property
    def held(self) -> object:
        """An object that keeps alive the pages and states that a pass reads and writes."""
        return self._held if self.recurrent is None else (self._held, self.recurrent.arrays)

    @property
    def page_table(self) -> int:
        """The address of `addresses`, valid until the cache grows."""
        return self._held.table

    @property
    def scope(self) -> Scope:
        """Which texts share its pages."""
        return scope_of(None if self.adapter is None else self.adapter.fingerprint, self.salt)

    @property
    def page_count(self) -> int:
        """Allocated pages, including shared ones."""
        return len(self._held.arrays)

    @property
    def held_arrays(self) -> list[NDArray[Any]]:
        """All pages and states, including shared ones."""
        return [*self._held.arrays, *(() if self.recurrent is None else self.recurrent.held)]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and states, including shared ones."""
        return sum(array.nbytes for array in self.held_arrays)

    def missing_bytes(self, tokens: int) -> int:
        """Bytes that a pass of `tokens` more tokens allocates."""
        state = 0 if self.recurrent is None else self.recurrent.missing_bytes
        return len(self._new_pages(tokens)) * self.page_bytes + state

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens, in pages that no fork shares, and for the state after them.

        Raises ContextLengthError beyond the limit, OutOfMemoryError if memory is too short.
        """
        with self.in_use:
            need = self.length + check_whole("tokens", tokens)
            if need > self.limit:
                raise ContextLengthError(
                    f"{self.length} tokens in the cache and {tokens} more exceed the limit of {self.limit}; "
                    "shorten the prompt, or raise the context if the model allows more"
                )
            if self.recurrent is not None and self.recurrent.missing_bytes:
                self.recurrent.add_spare(self.new_state())
            held, written = self._held, self._new_pages(tokens)
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
                    self._copy_positions(arrays[i], page, max(0, self.length - i * PAGE))
                    arrays[i] = page
            self._held = Pages(arrays, addresses)
            for i in written:
                self._shared.pop(i, None)

    def _new_pages(self, tokens: int) -> list[int]:
        """The indices of the pages that `tokens` more tokens need and that are missing, or shared and to be copied."""
        pages = range(self.length // PAGE, ceil_div(self.length + tokens, PAGE))
        return [
            i
            for i in pages
            if i >= len(self._held.arrays) or max(0, self.length - i * PAGE) < self._shared.get(i, 0)
        ]

    def reusable(self, length: int) -> int:
        """How many of the first `length` tokens `truncate` and `fork` can keep.

        Attention layers can be truncated to any length: min(length, self.length). Recurrent layers only to a
        checkpoint.
        """
        length = check_whole("length", length)
        return min(length, self.length) if self.recurrent is None else self.recurrent.reusable(length, self.length)

    def expected(self, length: int) -> int:
        """How many of the first `length` tokens will be reusable once they are computed."""
        recurrent = self.recurrent
        return length if recurrent is None else recurrent.expected(length, self.length)

    def truncate(self, length: int) -> None:
        """Discard all but the first `length` tokens; OptionError unless `reusable` allows that length."""
        with self.in_use:
            self._check_length(length)
            self.cuts += length < self.length
            if self.recurrent is not None:
                self.recurrent.cut(length)
            self.length = int(length)

    def mark(self, positions: Iterable[int]) -> None:
        """Request checkpoints at these positions, at which other texts may branch off: `span` ends passes there.

        A position among a page's first MIN_PREFIX tokens moves back to the page's start: no shorter page is shared.
        """
        if self.recurrent is not None:
            self.recurrent.marks = sorted({at - at % PAGE if at % PAGE < MIN_PREFIX else at for at in positions})

    def span(self, tokens: int) -> int:
        """How many of the next `tokens` tokens one pass may run: at least 1, if there are any."""
        return tokens if self.recurrent is None else self.recurrent.span(self.length, tokens)

    def begin(self, tokens: int, draft_tokens: int = 0) -> None:
        """Prepare a pass of `tokens` tokens, for which there is room.

        draft_tokens: how many of the last ones are drafts, which `retract` may remove.
        """
        if self.recurrent is not None:
            if self.recurrent.missing_bytes:
                self.recurrent.add_spare(self.new_state())
            self.recurrent.begin(self.length, tokens, draft_tokens)

    def advance(self, tokens: int) -> None:
        """Append the tokens of a completed pass."""
        if self.recurrent is not None:
            self.recurrent.commit()
        self.length += tokens

    def keep_checkpoint(self) -> None:
        """Keep a checkpoint of the newest state, so that the cache can be truncated to it later."""
        if self.recurrent is not None:
            self.recurrent.keep()

    def retract(self, count: int) -> None:
        """Remove the last `count` tokens, draft tokens that are in no text yet; `restore` can put some of them back.

        Unlike `truncate`, this does not count in `cuts`.
        """
        with self.in_use:
            self.length -= count

    def restore(self, count: int) -> None:
        """Put back the first `count` of the retracted tokens; no pass may have run in between."""
        with self.in_use:
            self.length += count

    def fork(self, length: int | None = None) -> KVCache:
        """An independent cache with the first `length` tokens (default: all). It allocates at most one page.

        Full pages are shared, and copied by whichever of the two writes to one after a `truncate`. Raises OptionError
        unless `reusable` allows that length, OutOfMemoryError if a page cannot be allocated.
        """
        with self.in_use:
            length = self.length if length is None else length
            self._check_length(length)
            fork = copy(self)
            fork.in_use = _OneThread()
            fork.tail = None
            fork.length = int(length)
            held, full = self._held, length // PAGE
            arrays, addresses = held.arrays[:full], np.zeros_like(held.addresses)
            addresses[:full] = held.addresses[:full]
            if length % PAGE:
                self._check_memory(1, length)
                page = self._new_page()
                self._copy_positions(held.arrays[full], page, length % PAGE)
                arrays.append(page)
                addresses[full] = page.ctypes.data
            fork._held = Pages(arrays, addresses)
            if self.recurrent is not None:
                fork.recurrent = self.recurrent.fork(length)
            fork._shared = dict.fromkeys(range(full), PAGE)
            self._shared.update(fork._shared)
            return fork

    def share(self, length: int) -> list[NDArray[Any]]:
        """The pages of the first `length` tokens, for others to read.

        The cache appends after these tokens in place, and copies a page before it overwrites one of them.
        """
        with self.in_use:
            if length > self.length:
                raise OptionError(f"length is {length}; the cache has {self.length} tokens")
            count = ceil_div(length, PAGE)
            for i in range(count):
                self._shared[i] = max(self._shared.get(i, 0), min(PAGE, length - i * PAGE))
            return self._held.arrays[:count]

    def states(self, length: int) -> list[State]:
        """A hybrid's recurrent states at positions up to `length`, for others to read; empty for other models."""
        if self.recurrent is None:
            return []
        with self.in_use:
            states = {state.position: state.array for state in (*self.recurrent.checkpoints, self.recurrent.newest)}
            return [State(position, array) for position, array in states.items() if 0 < position <= length]

    def adopt(self, pages: Sequence[NDArray[Any]], length: int, checkpoints: Iterable[State] = ()) -> int:
        """Replace all tokens by `length` tokens in shared `pages`; returns how many tokens the cache then holds.

        pages: of `page_shape`, from `share` of a cache of this model; they are copied before they are written.
        checkpoints: a hybrid's states at positions within these tokens. Raises ContextLengthError beyond the limit.

        Attention layers can use any part of the last page, so all tokens are kept; a hybrid keeps those up to the last
        checkpoint.
        """
        with self.in_use:
            if length > self.limit:
                raise ContextLengthError(f"{length} tokens exceed the cache's limit of {self.limit}")
            addresses = np.zeros_like(self._held.addresses)
            addresses[: len(pages)] = [page.ctypes.data for page in pages]
            self.cuts += 1
            self.length = 0
            if self.recurrent is not None:
                length = self.recurrent.replace(checkpoints)
            self._shared = dict.fromkeys(range(len(pages)), PAGE)
            self._held = Pages(list(pages), addresses)
            self.length = length
            return length

    def pages(self, length: int) -> list[NDArray[Any]]:
        """Views of the tiles of each page that hold the first `length` positions."""
        ends = [min(PAGE, length - start) for start in range(0, length, PAGE)]
        return [page_part(page, end, self.tile) for page, end in zip(self._held.arrays, ends, strict=False)]

    def _copy_positions(self, source: NDArray[Any], target: NDArray[Any], count: int) -> None:
        """Copy a page's first `count` positions, rounded up to whole tiles."""
        page_part(target, count, self.tile)[:] = page_part(source, count, self.tile)

    def _check_length(self, length: int) -> None:
        reusable = self.reusable(length)
        if length > self.length:
            raise OptionError(f"length is {length}; the cache has {self.length} tokens")
        if reusable != length:
            raise OptionError(f"length is {length}; this hybrid's last checkpoint before it is at {reusable}")

    def new_page(self) -> NDArray[Any]:
        """A new page of zeros, not added to this cache. Raises OutOfMemoryError if memory is too short."""
        self._check_memory(1, 1)
        return self._new_page()

    def new_state(self) -> NDArray[np.float32]:
        """A new recurrent state of a hybrid, all zeros. Raises OutOfMemoryError if memory is too short."""
        recurrent = self.recurrent
        assert recurrent is not None
        needed = recurrent.shape.nbytes
        try:
            if self._evict_for(needed, lambda: self._evict() or recurrent.drop_checkpoint()) is None:
                return new_memory(needed).view(np.float32).reshape(recurrent.shape.layers, recurrent.shape.state)
        except OSError:  # a limit on the address space, or a system that does not overcommit
            pass
        raise OutOfMemoryError(
            f"the recurrent state needs another {needed / 1e9:.2f} GB, which is more than the available memory; "
            "close other programs"
        )

    def _new_page(self) -> NDArray[Any]:
        try:
            memory = new_memory(self.page_bytes)
        except OSError:  # a limit on the address space, or a system that does not overcommit
            raise self._too_large(1, self.length + 1, 0) from None
        return memory.view(self.page_dtype).reshape(self.page_shape)

    def _check_memory(self, pages: int, need: int) -> None:
        available = self._evict_for(pages * self.page_bytes, self._evict)
        if available is not None:
            raise self._too_large(pages, need, available)

    def _evict_for(self, nbytes: int, evict: Callable[[], bool]) -> int | None:
        """Call `evict` until memory can hold `nbytes` more. Returns None, or the available bytes once `evict` returns
        False."""
        while is_too_little(available := available_memory(), nbytes):
            if not evict():
                return available
        return None

    def _too_large(self, pages: int, need: int, available: int) -> OutOfMemoryError:
        fits = (max(0, available - HEADROOM) // self.page_bytes + len(self._held.arrays)) * PAGE
        return OutOfMemoryError(
            f"a cache of {need} tokens needs another {pages * self.page_bytes / 1e9:.2f} GB and "
            f"{available / 1e9:.2f} GB of memory are available, enough for {fits} tokens; "
            "shorten the prompt, or close other programs"
        )


def held_bytes(caches: Iterable[KVCache], pages: Iterable[NDArray[Any]] = ()) -> int:
    """Bytes of the pages and states of several caches and of further `pages`, shared ones counted once."""
    held = {id(array): array.nbytes for cache in caches for array in cache.held_arrays}
    held.update((id(page), page.nbytes) for page in pages)
    return sum(held.values())
