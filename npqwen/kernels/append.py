"""Appending a token's keys and values to the KV cache: kernels for each of its types, called by address."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from npqwen.kernels.cache_page import PAGE, store_key, store_value
from npqwen.kernels.compiled import address_of
from npqwen.kernels.entry import entry
from npqwen.kernels.int8_page import store_int8_key, store_int8_value
from npqwen.simd.scalar import memory

APPEND_KEY, APPEND_VALUE = range(2)
"""Indexes of `append_kernels`."""


def _int8_kernels() -> tuple[Any, Any]:
    @entry("int8")
    def append_key(pages_at: int, index: int, position: int, key_at: int, dim: int) -> None:
        pages = memory(pages_at, position // PAGE + 1, np.int64)
        store_int8_key(pages, index, position, memory(key_at, dim, np.float32))

    @entry("int8")
    def append_value(pages_at: int, index: int, position: int, value_at: int, dim: int) -> None:
        pages = memory(pages_at, position // PAGE + 1, np.int64)
        store_int8_value(pages, index, position, memory(value_at, dim, np.float32))

    return append_key, append_value


def _float_kernels(dtype: Any) -> tuple[Any, Any]:
    of_dtype = np.zeros(0, dtype)

    @entry(np.dtype(dtype).name)
    def append_key(pages_at: int, index: int, position: int, key_at: int, dim: int) -> None:
        pages = memory(pages_at, position // PAGE + 1, np.int64)
        store_key(pages, of_dtype, index, position, memory(key_at, dim, np.float32))

    @entry(np.dtype(dtype).name)
    def append_value(pages_at: int, index: int, position: int, value_at: int, dim: int) -> None:
        pages = memory(pages_at, position // PAGE + 1, np.int64)
        store_value(pages, of_dtype, index, position, memory(value_at, dim, np.float32))

    return append_key, append_value


KERNELS = {
    np.dtype(np.uint8): _int8_kernels(),
    np.dtype(np.uint16): _float_kernels(np.uint16),
    np.dtype(np.float32): _float_kernels(np.float32),
}
"""The kernels for keys and for values, by the dtype of the cache.

They take the address of the pages' addresses, int64; the index of a page's head, and the position, see `store_key`; and
a head's key or value, float32 (dim,), which may be overwritten.
"""


def append_kernels(dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """Addresses of the kernels for a dtype of the cache, compiled or loaded: [APPEND_KEY, APPEND_VALUE]."""
    return np.array([address_of(kernel) for kernel in KERNELS[dtype]], np.int64)
