"""The k greatest of many logits, the first step of sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.simd.blocks import reduce_max
from npqwen.simd.tile import prefetch

MAXIMA_BLOCK = 64
"""Values of a block whose maximum decides whether they are compared one by one."""
_BLOCK_BYTES = 4 * MAXIMA_BLOCK


@njit(nogil=True, error_model="numpy")
def block_maxima(values: Any, at: int, maxima: Any) -> None:
    """maxima[n] = the greatest of the MAXIMA_BLOCK values of block n, which begin at values[at:]; NaN if there is one.

    values: float32, flat.
    """
    for n in range(maxima.size):
        maxima[n] = reduce_max(values, at + n * MAXIMA_BLOCK, MAXIMA_BLOCK)


@njit(nogil=True, error_model="numpy")
def all_maxima(values: Any, maxima: Any) -> None:
    """maxima = those of the whole blocks of `values`, see `block_maxima`; called from Python.

    Numba compiles `block_maxima` into the kernels that call it, and would not cache it as a kernel of its own.
    """
    block_maxima(values, 0, maxima)


@njit(nogil=True, error_model="numpy")
def select(values: Any, maxima: Any, tops: Any, ids: Any) -> int:
    """ids = the indices, ascending, of the tops.size greatest values and of all equal to the last of these; return how
    many there are.

    values: float32, at least tops.size; NaN counts as the greatest. maxima: see `block_maxima`, float32
    (values.size // MAXIMA_BLOCK,). tops: scratch, float32 (k,). ids: int64 (values.size,).
    """
    tops[:] = -np.inf
    for n in range(maxima.size):
        _insert(tops, maxima[n])
    for n in range(maxima.size):
        if not maxima[n] < tops[-1]:
            prefetch(values, n * MAXIMA_BLOCK, _BLOCK_BYTES)
    # The k-th greatest of the blocks' maxima is at most the k-th greatest of all.
    candidates = _find_not_below(values, maxima, tops[-1], ids)
    tops[:] = -np.inf
    for n in range(candidates):
        _insert(tops, values[ids[n]])
    count = 0
    for n in range(candidates):
        if not values[ids[n]] < tops[-1]:
            ids[count] = ids[n]
            count += 1
    return count


@njit(nogil=True)
def _find_not_below(values: Any, maxima: Any, bound: np.float32, ids: Any) -> int:
    """ids = the indices of the values that are not below a bound, NaN included; returns their number."""
    count = 0
    for at in range(0, values.size, MAXIMA_BLOCK):
        if at + MAXIMA_BLOCK > values.size or not maxima[at // MAXIMA_BLOCK] < bound:
            for i in range(at, min(at + MAXIMA_BLOCK, values.size)):
                if not values[i] < bound:
                    ids[count] = i
                    count += 1
    return count


@njit(nogil=True)
def _insert(tops: Any, value: np.float32) -> None:
    """Insert a value into the greatest so far, descending, if it is one of them."""
    n = tops.size - 1
    if value <= tops[n]:
        return
    while n > 0 and not value <= tops[n - 1]:
        tops[n] = tops[n - 1]
        n -= 1
    tops[n] = value
