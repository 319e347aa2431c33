"""Pages of the KV cache: the layout of keys and values, and writing those of a token.

The cache comes in pages of `PAGE` positions. A page holds, layer by layer, the keys of each head and then the values of
each. npqwen/kernels/int8_page.py has the layout of a head's int8; this file has that of float16 (uint16 to Numba) and
float32; the array `cache_dtype` carries the dtype. Keys lie in position tiles: 16 positions, (16, head_dim) transposed
to (head_dim, 16), so that a vector holds one coordinate of many positions and scores need no sums across a vector.
Values lie as (position, head_dim).
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import overload

from npqwen.simd.scalar import half, memory

PAGE = 256
"""Positions of a page of the cache."""
POSITION_TILE = 16
"""Positions of a tile of keys."""


def _stored(value, cache_dtype):  # type: ignore[no-untyped-def]  # Numba requires the same signature below
    """A float32 as the cache holds it: itself, or the bits of a float16."""
    raise NotImplementedError("compiled code only")


@overload(_stored)
def _compiled_stored(value, cache_dtype):  # type: ignore[no-untyped-def]
    if cache_dtype.dtype == types.float32:
        return lambda value, cache_dtype: value
    return lambda value, cache_dtype: half(value)


@njit(nogil=True)
def _head(pages: Any, cache_dtype: Any, position: int, index: int, head_dim: int) -> Any:
    """The keys or values at an index in the page that holds a position: (PAGE * head_dim,)."""
    size = PAGE * head_dim
    return memory(pages[position // PAGE] + cache_dtype.itemsize * index * size, size, cache_dtype.dtype)


@njit(nogil=True)
def store_key(pages: Any, cache_dtype: Any, index: int, position: int, key: Any) -> None:
    """Write one head's key, float32 (head_dim,), into the cache; index = (layer * 2) * kv_heads + head."""
    keys = _head(pages, cache_dtype, position, index, key.size)
    slot = position % PAGE
    at = slot // POSITION_TILE * POSITION_TILE * key.size + slot % POSITION_TILE
    for i in range(key.size):
        keys[at + i * POSITION_TILE] = _stored(key[i], cache_dtype)


@njit(nogil=True)
def store_value(pages: Any, cache_dtype: Any, index: int, position: int, value: Any) -> None:
    """Write one head's value, float32 (head_dim,), into the cache; index = (layer * 2 + 1) * kv_heads + head."""
    values = _head(pages, cache_dtype, position, index, value.size)
    at = position % PAGE * value.size
    for i in range(value.size):
        values[at + i] = _stored(value[i], cache_dtype)
