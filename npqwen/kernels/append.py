"""Appending a token's keys and values to the KV cache, of whichever type it is."""

from __future__ import annotations

from typing import Any

from numba import njit

from npqwen.kernels.cache_page import store_key, store_value
from npqwen.kernels.int8_page import store_int8_key, store_int8_value


@njit(nogil=True)
def append_key(pages: Any, cache_dtype: Any, index: int, position: int, key: Any) -> None:
    """Write one head's key, float32 (head_dim,), into the cache, and perhaps over it; see `store_key`."""
    if cache_dtype.itemsize == 1:
        store_int8_key(pages, index, position, key)
    else:
        store_key(pages, cache_dtype, index, position, key)


@njit(nogil=True)
def append_value(pages: Any, cache_dtype: Any, index: int, position: int, value: Any) -> None:
    """Write one head's value, float32 (head_dim,), into the cache; see `store_value`."""
    if cache_dtype.itemsize == 1:
        store_int8_value(pages, index, position, value)
    else:
        store_value(pages, cache_dtype, index, position, value)
