"""KV caches of texts that have ended, kept for texts that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache

SHARED = 16
"""Tokens of a common prefix that are worth a fork, or waiting for whoever computes them: fewer are soon computed."""

Ids = NDArray[np.int32]


@dataclass(eq=False)
class Kept:
    """The tokens in a cache, in order."""

    ids: Ids
    cache: KVCache


class Prefixes:
    """Caches in the order of their last use; the oldest are given up first."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def caches(self) -> list[KVCache]:
        """All caches that are kept."""
        return [kept.cache for kept in self._kept]

    def keep(self, ids: Ids, cache: KVCache) -> None:
        """Keep the cache of these tokens, and drop those whose tokens are a prefix of them."""
        if cache.length < SHARED:
            return
        self._kept = [old for old in self._kept if common_prefix(old.ids, ids) < len(old.ids)]
        self._kept.append(Kept(ids, cache))

    def longest(self, ids: Ids) -> tuple[int, Kept | None]:
        """The kept cache with the longest common prefix with `ids`, and the length of that prefix."""
        lengths = [common_prefix(kept.ids, ids) for kept in self._kept]
        if not lengths:
            return 0, None
        best = int(np.argmax(lengths[::-1]))
        return lengths[-1 - best], self._kept[-1 - best]

    def use(self, kept: Kept, length: int) -> KVCache:
        """A cache with the first `length` tokens: the kept one itself if that is all it has, else a fork of it."""
        self._kept.remove(kept)
        if length == len(kept.ids):
            return kept.cache
        self._kept.append(kept)
        return kept.cache.fork(length)

    def drop_oldest(self) -> bool:
        """Give up the cache that was not used for the longest time; returns whether there was one."""
        return bool(self._kept) and self._kept.pop(0) is not None


def common_prefix(a: Sequence[int] | Ids, b: Sequence[int] | Ids) -> int:
    """The length of the longest common prefix of two texts, in tokens."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:size], np.int32) != np.asarray(b[:size], np.int32))
    return int(differ[0]) if len(differ) else size
