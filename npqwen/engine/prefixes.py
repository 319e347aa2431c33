"""A model's pool of cached prefixes: keys and values of earlier texts, for texts that begin alike.

    extend(ids, cache) ─ pages in memory ─ files (prefix_files.py) ──► KVCache.adopt
    keep(ids, cache) ◄─ KVCache.share ──► pages in memory ──► prefix_writer.py, in the background

A page is found by the key of all tokens up to its last (prefix_page.py); the page in which two texts diverge, or one of
them ends, by comparing tokens. Pages are shared with the caches, never copied here. A hybrid's pages have recurrent
states, too, and its prefixes end at one. Keys depend on the adapter and the salt: a text never finds pages that were
computed with another adapter, or for a text with another salt.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.prefix_page import (
    MIN_PREFIX,
    Ids,
    PrefixPage,
    Scope,
    branch_of,
    common_prefix,
    key_after,
    root_key,
)
from npqwen.engine.prefix_writer import PrefixWriter
from npqwen.engine.recurrent_states import State
from npqwen.errors import OutOfMemoryError, PrefixCacheWarning, user_stacklevel
from npqwen.format.layout import ceil_div
from npqwen.kernels.cache_page import PAGE

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache
    from npqwen.engine.prefix_files import PrefixFiles

_GROWN = 64
"""New tokens after which an incomplete page is written to a file again."""


class Prefix(NamedTuple):
    """A cached prefix of a text."""

    pages: list[PrefixPage]
    """The last one may hold more tokens than the prefix has."""
    length: int
    """Tokens."""

    def load_into(self, cache: KVCache) -> int:
        """Replace a cache's tokens by the prefix; returns how many tokens the cache then holds."""
        return cache.adopt([page.array for page in self.pages], self.length, self.states())

    def states(self) -> list[State]:
        """A hybrid's recurrent states within the prefix, in order of position; empty for other models."""
        found = (
            State(page.depth * PAGE + offset, array)
            for page in self.pages
            for offset, array in page.states.items()
        )
        return sorted((state for state in found if state.position <= self.length), key=lambda state: state.position)

    def up_to_state(self) -> Prefix:
        """The part up to the last recurrent state."""
        states = self.states()
        length = states[-1].position if states else 0
        return Prefix(self.pages[: ceil_div(length, PAGE)], length)


class Prefixes:
    """Pages in memory, the least recently used first, and the files behind them. Any thread may call any method.

    A page always counts as more recently used than those that follow it, so prefixes are evicted from their ends.
    """

    def __init__(
        self,
        limit: int,
        *,
        recurrent: bool = False,
        adjustable: bool = False,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        """limit: bytes in memory; 0 keeps nothing. recurrent: whether the model is a hybrid. adjustable: whether
        `allow` changes the limit. notice: called in a caller's thread with lines about files that were damaged or could
        not be written; by default they become a PrefixCacheWarning.
        """
        self._limit = limit
        self._recurrent = recurrent
        self._adjustable = adjustable
        self._files: PrefixFiles | None = None
        self._root = b""
        self._writer: PrefixWriter | None = None
        self._notice = notice
        self._lock = threading.Lock()
        self._pages: OrderedDict[bytes, PrefixPage] = OrderedDict()
        self._branches: dict[tuple[bytes, bytes], list[PrefixPage]] = {}
        self._nbytes = 0

    def open(self, files: PrefixFiles, busy: Callable[[], bool] = lambda: False) -> None:
        """Read pages from these files, and write pages to them; once, before any other method is called.

        busy: returns whether a pass is running; pages are written between passes.
        """
        self._files, self._root, self._writer = files, files.root, PrefixWriter(files, busy)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in memory, including those that caches share."""
        return self._nbytes

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """All pages and states in memory, including those that wait to be written to a file."""
        with self._lock:
            pages = list(self._pages.values())
        if self._writer is not None:
            pages += self._writer.waiting()
        return [array for page in pages for array in (page.array, *page.states.values())]

    def find(self, ids: Ids, scope: Scope = ()) -> Prefix:
        """The longest prefix of `ids` in memory that a cache of this scope can use; it counts as used."""
        found = self._find(ids, self._root_of(scope))
        return found.up_to_state() if self._recurrent else found

    def _find(self, ids: Ids, root: bytes) -> Prefix:
        """The longest prefix of `ids` in memory after the key `root`."""
        with self._lock:
            pages, length = self._full_pages(ids, root)
            page, more = self._partial(pages[-1].key if pages else root, ids[length:])
            if page is not None:
                pages.append(page)
            self._touch(pages)
            return Prefix(pages, length + more)

    def fetch(self, ids: Ids, scope: Scope = ()) -> Prefix:
        """The longest prefix of `ids` of this scope in memory and in files, whose pages are read into memory."""
        root = self._root_of(scope)
        found = self._find(ids, root)
        if self._files is not None and self._limit and len(ids) - found.length >= MIN_PREFIX:
            try:
                found = self._read(self._files, ids, found, root)
            finally:
                self._report()
        return found.up_to_state() if self._recurrent else found

    def extend(self, ids: Ids, cache: KVCache) -> int:
        """Extend a cache that holds a proper prefix of `ids` to the longest known prefix.

        Returns how many tokens it then holds. It is left as it is unless it gains at least MIN_PREFIX tokens. Only
        prefixes of the cache's scope are used.
        """
        if not self._limit or len(ids) - cache.length < MIN_PREFIX:
            return cache.length
        found = self.fetch(ids, cache.scope)
        return found.load_into(cache) if found.length >= cache.length + MIN_PREFIX else cache.length

    def keep(self, ids: Ids, cache: KVCache) -> None:
        """Add the first len(ids) tokens of a cache, which are `ids`, to the pool, and queue them for writing."""
        rest = len(ids) % PAGE
        length = len(ids) if rest >= MIN_PREFIX else len(ids) - rest
        if not self._limit or not length:
            return
        arrays, states, root = cache.share(length), cache.states(length), self._root_of(cache.scope)
        with self._lock:
            chain: list[PrefixPage] = []
            for depth, array in enumerate(arrays):
                parent = chain[-1].key if chain else root
                start, end = depth * PAGE, min(length, (depth + 1) * PAGE)
                page = PrefixPage(parent, ids[start:end].astype(np.int32), array, depth)
                page.states = {state.position - start: state.array for state in states if start < state.position <= end}
                chain.append(self._add(page))
            self._touch(chain)
            self._evict()
            if self._writer is not None:
                written = [page for page in chain if _worth_writing(page)]
                for page in written:
                    page.is_outdated |= not page.stored_states.issuperset(page.states)
                    page.stored, page.stored_states = len(page.ids), frozenset(page.states)
                self._writer.put(written, max(1, self._limit // arrays[0].nbytes))

    def evict_oldest(self) -> bool:
        """Evict the least recently used page, or if there is none, all pages that wait to be written.

        Returns whether there was anything to evict.
        """
        with self._lock:
            if self._pages:
                self._drop()
                return True
        return self._writer is not None and self._writer.forget()

    def set_limit(self, limit: int) -> None:
        """Set the limit in bytes, unless the user has set it."""
        with self._lock:
            if self._adjustable:
                self._limit = limit
                self._evict()

    def clear(self) -> None:
        """Evict all pages in memory."""
        with self._lock:
            self._pages.clear()
            self._branches.clear()
            self._nbytes = 0

    def close(self) -> None:
        """Finish writing, and evict all pages in memory."""
        if self._writer is not None:
            self._writer.close()
        self.clear()
        self._report()

    def _root_of(self, scope: Scope) -> bytes:
        """The key before the first token of texts of a scope."""
        return root_key(self._root, *scope) if scope else self._root

    def _read(self, files: PrefixFiles, ids: Ids, found: Prefix, root: bytes) -> Prefix:
        """Extend a prefix of `ids`, found after the key `root`, by pages read from files."""
        pages, length = found.pages.copy(), found.length
        last = pages.pop() if length % PAGE else None
        length -= length % PAGE
        room = self._limit // files.page_bytes - len(pages)
        parent = pages[-1].key if pages else root
        end = None
        try:
            while len(ids) - length >= PAGE and room > 0:
                page = files.read(parent, ids[length : length + PAGE], len(pages))
                if page is None:
                    break
                pages.append(page)
                length += PAGE
                room -= 1
                parent, last = page.key, None
            least = MIN_PREFIX if last is None else found.length - length + MIN_PREFIX
            if len(ids) - length >= least and room > 0:
                end = files.read_longest(parent, ids[length : length + PAGE], len(pages), least)
        except OutOfMemoryError:
            pass  # what is not read is computed, or refused, as if there were no file
        if end is None and last is not None:
            return found
        if end is not None:
            pages.append(end)
            length += common_prefix(end.ids, ids[length:])
        with self._lock:
            pages = [self._add(page) for page in pages]
            self._touch(pages)
            self._evict()
        return Prefix(pages, length)

    def _full_pages(self, ids: Ids, root: bytes) -> tuple[list[PrefixPage], int]:
        """The pages in memory after the key `root` whose tokens are all in `ids`, and their number of tokens."""
        pages: list[PrefixPage] = []
        key, length = root, 0
        while len(ids) - length >= PAGE:
            key = key_after(key, ids[length : length + PAGE])
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
            length += PAGE
        return pages, length

    def _partial(self, parent: bytes, ids: Ids) -> tuple[PrefixPage | None, int]:
        """The page after `parent` with the longest common prefix with `ids`, and that prefix's length."""
        best, longest = None, MIN_PREFIX - 1
        for page in self._branches.get(branch_of(parent, ids), ()):
            length = common_prefix(page.ids, ids)
            if length > longest:
                best, longest = page, length
        return best, 0 if best is None else longest

    def _add(self, page: PrefixPage) -> PrefixPage:
        """Add a page, in place of any that has only the first of its tokens, unless one in memory has all of them.

        Returns the page that is then in memory, with the states of both.
        """
        known = self._pages.get(page.key)
        if known is not None:
            return self._with_states(known, page)
        for other in self._branches.get(page.branch, []).copy():
            common = common_prefix(page.ids, other.ids)
            if common == len(page.ids):
                return self._with_states(other, page)
            if common == len(other.ids):
                page.states = other.states | page.states
                page.stored = max(page.stored, other.stored)
                page.replaces = other.key if other.stored == len(other.ids) else other.replaces
                self._remove(other)
        self._branches.setdefault(page.branch, []).append(page)
        self._pages[page.key] = page
        self._nbytes += page.nbytes
        return page

    def _with_states(self, page: PrefixPage, other: PrefixPage) -> PrefixPage:
        """Add to a page in memory the states of another, whose tokens it has, too; returns the page in memory."""
        self._nbytes -= page.nbytes
        page.states = other.states | page.states
        self._nbytes += page.nbytes
        return page

    def _touch(self, pages: list[PrefixPage]) -> None:
        """Note the use of a prefix's pages: each becomes more recently used than those after it."""
        now = time.time_ns()
        for page in reversed(pages):
            page.used = now
            if page.key in self._pages:
                self._pages.move_to_end(page.key)

    def _evict(self) -> None:
        while self._pages and self.nbytes > self._limit:
            self._drop()

    def _drop(self) -> None:
        self._remove(next(iter(self._pages.values())))

    def _remove(self, page: PrefixPage) -> None:
        del self._pages[page.key]
        self._nbytes -= page.nbytes
        branch = [other for other in self._branches.get(page.branch, ()) if other is not page]
        if branch:
            self._branches[page.branch] = branch
        else:  # or an interrupt came between page and branch
            self._branches.pop(page.branch, None)

    def _report(self) -> None:
        """Report damaged files and failed writes."""
        if self._files is None or self._writer is None:
            return
        for line in (self._files.take_damaged(), self._writer.take_problem()):
            if line is None:
                continue
            if self._notice is not None:
                self._notice(line)
            else:
                warnings.warn(line, PrefixCacheWarning, stacklevel=user_stacklevel())


def _worth_writing(page: PrefixPage) -> bool:
    """Whether to pass a page to the writer: a full one always, which at least updates the file's time of use; others
    if enough of them is not in a file."""
    grown = len(page.ids) - page.stored >= _GROWN or not page.stored_states.issuperset(page.states)
    return page.is_full or not page.stored or grown
