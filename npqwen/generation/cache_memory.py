"""The memory for keys and values: of running texts, of the models that draft for them, and of kept prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from npqwen.engine.kv_cache import held_bytes

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache
    from npqwen.engine.prefixes import Prefixes


class CacheMemory:
    """Accounts for the caches of a model, and perhaps of its draft model, and evicts kept prefixes to make room."""

    def __init__(self, pools: Sequence[Prefixes], limit: int | None) -> None:
        """pools: of kept prefixes, those to evict first before the others. limit: in bytes, for all models together;
        None: whatever is available."""
        self._pools = pools
        self.set_limit(limit)

    @property
    def limit(self) -> int | None:
        """Bytes; None: whatever is available."""
        return self._limit

    def set_limit(self, limit: int | None) -> None:
        """Change the limit. Until `trim`, more may be held."""
        self._limit = limit
        if limit is not None:
            for pool in self._pools:
                pool.set_limit(limit)

    def held(self, caches: Iterable[KVCache]) -> int:
        """Bytes of these caches and of kept prefixes, shared pages counted once."""
        return held_bytes(caches, (page for pool in self._pools for page in pool.arrays))

    def lacks(self, caches: Iterable[KVCache], more: int) -> bool:
        """Whether these caches, kept prefixes and `more` bytes exceed the limit."""
        return self._limit is not None and self.held(caches) + more > self._limit

    def evict_prefix(self) -> bool:
        """Evict the least recently used page of the kept prefixes; returns whether there was one."""
        return any(pool.evict_oldest() for pool in self._pools)

    def trim(self, caches: Iterable[KVCache]) -> None:
        """Evict kept prefixes until the limit is met, or none is left."""
        held = list(caches)
        while self.lacks(held, 0) and self.evict_prefix():
            pass
