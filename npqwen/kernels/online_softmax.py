"""The online softmax of attention (Milakov & Gimelshein 2018): scores become weights, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.simd.blocks import softmax_block
from npqwen.simd.scalar import exp, memory, multiply_add

SCORE_BLOCK = 64
"""Positions whose scores are computed before they are used."""
LOWEST = np.float32(-3.0e38)
"""The row maximum before there are scores."""


@njit(inline="always")
def results(at: int, rows: int, dim: int) -> Any:
    """The arrays in which a kernel leaves its results at an address, initialized: accumulator, row_max, denominator.

    float32 (rows * dim,), zeros; (rows,), LOWEST; (rows,), zeros; one after another.
    """
    whole = memory(at, rows * (dim + 2), np.float32)
    whole[:] = np.float32(0.0)
    row_max = whole[rows * dim : rows * (dim + 1)]
    row_max[:] = LOWEST
    return whole[: rows * dim], row_max, whole[rows * (dim + 1) :]


@njit(inline="always")
def softmax(scores: Any, row: int, visible: int, dim: int, row_max: Any, denominator: Any, accumulator: Any) -> None:
    """Turn a row's scores into weights; if its maximum grows, rescale its denominator and accumulator.

    scores: float32 (rows, SCORE_BLOCK); those starting at index `visible` get no weight. row_max, denominator: float32
    (rows,). accumulator: float32 (rows, dim).
    """
    maximum, total = softmax_block(scores, row * SCORE_BLOCK, SCORE_BLOCK, visible, row_max[row])
    add_block(maximum, total, row, dim, row_max, denominator, accumulator)


@njit(inline="always")
def add_block(
    maximum: Any, total: Any, row: int, dim: int, row_max: Any, denominator: Any, accumulator: Any
) -> None:
    """Add a block's sum of weights to the denominator; if `maximum` exceeds row_max, rescale the row to it first.

    maximum: of the row's scores so far. total: sum of exp(score - maximum). The arrays are those of `softmax`.
    """
    if maximum > row_max[row]:
        rescale = exp(row_max[row] - maximum)
        denominator[row] *= rescale
        for i in range(row * dim, (row + 1) * dim):
            accumulator[i] *= rescale
        row_max[row] = maximum
    denominator[row] += total


@njit(nogil=True, error_model="numpy")
def merge(merged: Any, partial: Any, width: int, dim: int) -> None:
    """Log-sum-exp merge of attention over one span into that over others: accumulator, row_max, denominator.

    merged, partial: float32, accumulators (width, dim), then row_max (width,), then denominators (width,).
    """
    row_max, denominator = width * dim, width * (dim + 1)
    for t in range(width):
        maximum = max(merged[row_max + t], partial[row_max + t])
        a, b = exp(merged[row_max + t] - maximum), exp(partial[row_max + t] - maximum)
        for i in range(t * dim, (t + 1) * dim):
            merged[i] = multiply_add(merged[i], a, partial[i] * b)
        merged[row_max + t] = maximum
        merged[denominator + t] = multiply_add(merged[denominator + t], a, partial[denominator + t] * b)
