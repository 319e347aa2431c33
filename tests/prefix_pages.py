"""Caches whose keys and values are their tokens: what tests of prefixes compare."""

from __future__ import annotations

import numpy as np
from checkpoints import make_config
from numpy.typing import NDArray

from npqwen.engine.kv_cache import KVCache
from npqwen.format.config import Config
from npqwen.kernels.cache_page import PAGE, POSITION_TILE

SHAPE = Config.from_dict(make_config(num_hidden_layers=2, num_key_value_heads=1, head_dim=16))
Ids = NDArray[np.int32]


def new_cache(limit: int = 20 * PAGE) -> KVCache:
    """An empty cache."""
    return KVCache(SHAPE, limit, "f32")


def marks(ids: Ids, before: float = 1) -> NDArray[np.float32]:
    """At each position a hash of all tokens up to it. before: the hash before the first."""
    found, mark = [], int(before)
    for id in ids.tolist():
        mark = (mark * 31 + id + 7) % 999_983
        found.append(mark)
    return np.array(found, np.float32)


def run(cache: KVCache, ids: Ids) -> None:
    """Append tokens: each layer keeps, as keys and values, the hash at a token's position."""
    cache.reserve(ids.size)
    start, before = cache.length, content(cache)
    new = marks(ids, before[-1] if len(before) else 1)
    for i, page in enumerate(cache.pages(start + ids.size)):
        first, last = max(start, i * PAGE), min(start + ids.size, (i + 1) * PAGE)
        if first < last:
            at = np.arange(first, last) % PAGE
            values = new[first - start : last - start, None]
            for layer in page:
                layer[0, 0].reshape(-1, 16, POSITION_TILE)[at // POSITION_TILE, :, at % POSITION_TILE] = values
                layer[1, 0].reshape(-1, POSITION_TILE, 16)[at // POSITION_TILE, at % POSITION_TILE] = values
    cache.length = start + ids.size


def content(cache: KVCache) -> NDArray[np.float32]:
    """The hash at each position; all layers, keys and values must agree."""
    pages = cache.pages(cache.length)
    if not pages:
        return np.zeros(0, np.float32)
    keys = [page[:, 0, 0].reshape(2, -1, 16, POSITION_TILE).transpose(0, 1, 3, 2).reshape(2, -1, 16) for page in pages]
    values = [page[:, 1, 0].reshape(2, -1, 16) for page in pages]
    both = np.concatenate([np.concatenate(keys, 1), np.concatenate(values, 1)], 2)[:, : cache.length]
    first: NDArray[np.float32] = both[0, :, 0]
    assert (both == first[None, :, None]).all()
    return first


def computed(ids: Ids, limit: int = 20 * PAGE) -> KVCache:
    """A cache of these tokens, with nothing reused."""
    cache = new_cache(limit)
    run(cache, ids)
    return cache


def text(seed: int, length: int) -> Ids:
    """Random tokens, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 4096, length).astype(np.int32)
