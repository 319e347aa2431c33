"""Parts of the int8 attention kernel for 16 rows of queries on a processor with AMX (npqwen/kernels/int8_attention.py).

The results are bitwise equal to those of the parts for other processors.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from npqwen.format.encodings import BLOCK_COLUMNS, UNIT_ROWS
from npqwen.kernels.int8_page import INT8_TILE, SCALES_BYTES
from npqwen.kernels.online_softmax import SCORE_BLOCK
from npqwen.simd.amx import start_block
from npqwen.simd.amx_attention import finish_scores, finish_values, load_weights, start_values
from npqwen.simd.isa import ISA
from npqwen.simd.packed import block_bytes
from npqwen.simd.tile import prefetch, scale_rows, store, store_add, zeros

_BLOCK_BYTES = UNIT_ROWS * BLOCK_COLUMNS
_PAIR_BYTES = 2 * _BLOCK_BYTES
_X_BLOCK = block_bytes(UNIT_ROWS, ISA.start_bytes)


@njit(inline="always")
def compute_scores_amx(
    rows: int, vectors: int, queries: Any, keys: Any, at: int, following: Any, following_at: int, count: int,
    padded: int, scores: Any, room: Any,
) -> None:  # fmt: skip
    """scores[row, position] = queries[row] @ keys[position], for 16 rows; prefetches the following keys.

    vectors: 1. room: see `finish_scores`. The other arguments are those of `_compute_scores`.
    """
    for position in range(0, count, INT8_TILE):
        tile = at + position * (padded + 4)
        prefetch(following, following_at + position * (padded + 4), SCALES_BYTES)
        for lane in range(0, INT8_TILE, UNIT_ROWS):
            products = zeros(rows, vectors, 1)
            k, x = tile + SCALES_BYTES + lane * padded, 0
            for column in range(0, padded, 2 * BLOCK_COLUMNS):
                # Two blocks side by side: a sum waits for its product.
                prefetch(following, following_at + k - at, _PAIR_BYTES)
                start_block(0, keys, k, queries, x)
                if column + BLOCK_COLUMNS < padded:
                    start_block(1, keys, k + _BLOCK_BYTES, queries, x + _X_BLOCK)
                products = finish_scores(products, 0, queries, x, room)
                if column + BLOCK_COLUMNS < padded:
                    products = finish_scores(products, 1, queries, x + _X_BLOCK, room)
                k += _PAIR_BYTES
                x += 2 * _X_BLOCK
            products = scale_rows(products, vectors, keys, tile + 4 * lane)
            store(products, scores, position + lane, vectors, SCORE_BLOCK)


@njit(inline="always")
def add_weighted_values_amx(
    rows: int, vectors: int, weights: Any, scales: Any, values: Any, at: int, following: Any, following_at: int,
    dim: int, padded: int, accumulator: Any, room: Any,
) -> None:  # fmt: skip
    """accumulator[row] += scales[row] * weights[row] @ values, for 16 rows; prefetches the following values.

    vectors: 1. room: see `finish_scores`. The other arguments are those of `_add_weighted_values`.
    """
    pitch = INT8_TILE * (padded + 4)
    load_weights(weights, SCORE_BLOCK)
    for position in range(0, SCORE_BLOCK, INT8_TILE):
        prefetch(following, following_at + position * (padded + 4), SCALES_BYTES)
    for column in range(0, dim, 2 * UNIT_ROWS):
        v = at + SCALES_BYTES + column // UNIT_ROWS * _BLOCK_BYTES
        for position in range(0, SCORE_BLOCK, INT8_TILE):
            prefetch(following, following_at + v - at + position * (padded + 4), _PAIR_BYTES)
        start_values(0, values, v, pitch)
        if column + UNIT_ROWS < dim:
            start_values(1, values, v + _BLOCK_BYTES, pitch)
        sums = finish_values(zeros(rows, vectors, 1), 0, scales, room)
        store_add(sums, accumulator, column, vectors, dim)
        if column + UNIT_ROWS < dim:
            sums = finish_values(zeros(rows, vectors, 1), 1, scales, room)
            store_add(sums, accumulator, column + UNIT_ROWS, vectors, dim)
