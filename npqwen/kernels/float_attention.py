"""Attention over keys and values of float16 or float32: the kernel for one key/value head and a tile of query rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.kernels.cache_page import PAGE, POSITION_TILE
from npqwen.kernels.entry import entry
from npqwen.kernels.online_softmax import SCORE_BLOCK, results, softmax
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import CACHE_LINE
from npqwen.simd.scalar import memory
from npqwen.simd.tile import (
    FLOAT16,
    FLOAT32,
    LANES,
    chains,
    multiply_add_column,
    prefetch,
    store_add,
    store_tiles,
    zeros,
)

MEMORY_BOUND_ROWS = 4
"""Most rows of a product for which memory is the limit, so that prefetching keys and values far ahead pays."""
FAR_BYTES = 8192
"""Prefetch distance for keys and values: two position tiles of float16 keys of 128 coordinates."""


# The parts of a kernel, inlined into it. rows, vectors, together, dtype and far are constants: see `float_attention`.


@njit(inline="always")
def _prefetch_far_keys(keys: Any, k: int, dim: int, together: int, far: int) -> None:
    """Few rows, memory is the limit: prefetch the same coordinate of keys two position tiles ahead."""
    prefetch(keys, k + far, CACHE_LINE)
    prefetch(keys, k + far + (together - 1) * POSITION_TILE * dim, CACHE_LINE)


@njit(inline="always")
def _prefetch_next_values(values: Any, first: int, coordinate: int, together: int) -> None:
    """Many rows, arithmetic is the limit and leaves time: prefetch the values that are multiplied after the scores."""
    prefetch(values, first + together * coordinate, CACHE_LINE)


@njit(inline="always")
def _prefetch_far_values(values: Any, v: int, far: int) -> None:
    """Few rows: prefetch ahead as many values as the iteration of one position reads."""
    prefetch(values, v + far, 256)


@njit(inline="always")
def _prefetch_next_keys(keys: Any, at: int, dim: int, column: int, i: int, wide: int) -> None:
    """Many rows: prefetch the keys of the next block, a share at each position."""
    prefetch(keys, at + SCORE_BLOCK * (dim + column) + i * wide, CACHE_LINE)


@njit(inline="always")
def _compute_scores(
    rows: int, vectors: int, together: int, dtype: int, far: int,
    queries: Any, keys: Any, values: Any, at: int, count: int, dim: int, scores: Any,
) -> None:  # fmt: skip
    """scores[row, position] = queries[row] @ keys[position]."""
    for position in range(0, count, together * POSITION_TILE):
        for lane in range(0, POSITION_TILE, vectors * LANES):
            products = zeros(rows, vectors, together)
            k = at + position * dim + lane
            for i in range(0, queries.size, rows):
                if rows <= MEMORY_BOUND_ROWS:
                    _prefetch_far_keys(keys, k, dim, together, far)
                else:
                    first = at + position * dim
                    _prefetch_next_values(values, first, k - lane - first, together)
                products = multiply_add_column(
                    products, rows, together, dtype, keys, k, POSITION_TILE * dim, queries, i, 1
                )
                k += POSITION_TILE
            store_tiles(products, together, scores, position + lane, POSITION_TILE, vectors, SCORE_BLOCK)


@njit(inline="always")
def _add_weighted_values(
    rows: int, wide_vectors: int, narrow_vectors: int, dtype: int, far: int,
    weights: Any, keys: Any, values: Any, at: int, count: int, dim: int, accumulator: Any,
) -> None:  # fmt: skip
    """accumulator[row] += weights[row] @ values."""
    wide, column = wide_vectors * LANES, 0
    while column + wide <= dim:
        sums = zeros(rows, wide_vectors, 1)
        v = at + column
        for i in range(count):
            if rows <= MEMORY_BOUND_ROWS:
                _prefetch_far_values(values, v, far)
            else:
                _prefetch_next_keys(keys, at, dim, column, i, wide)
            sums = multiply_add_column(sums, rows, 1, dtype, values, v, 0, weights, i, SCORE_BLOCK)
            v += dim
        store_add(sums, accumulator, column, wide_vectors, dim)
        column += wide
    while column < dim:
        rest = zeros(rows, narrow_vectors, 1)
        v = at + column
        for i in range(count):
            rest = multiply_add_column(rest, rows, 1, dtype, values, v, 0, weights, i, SCORE_BLOCK)
            v += dim
        store_add(rest, accumulator, column, narrow_vectors, dim)
        column += POSITION_TILE


def float_attention(rows: int, dtype: Any) -> Any:
    """The kernel for tiles of `rows` rows of queries, and a cache of this dtype."""
    # Scores: a vector holds positions. Weighted sums: it holds coordinates.
    score_vectors = max(1, min(POSITION_TILE // LANES, ISA.accumulators // rows))
    # Several position tiles at once instead of several sums per score: decoding then adds in the order of prefill.
    together = min(2, chains(rows * score_vectors))
    wide_vectors, narrow_vectors = max(1, ISA.accumulators // rows), POSITION_TILE // LANES
    size = np.dtype(dtype).itemsize
    kind = FLOAT32 if size == 4 else FLOAT16
    far = FAR_BYTES // size

    @entry(rows, np.dtype(dtype).name, error_model="numpy")
    def attend(
        queries_at: int, dim: int, pages_at: int, key_index: int, value_index: int, low: int, high: int, start: int,
        first_row: int, group: int, scratch_at: int, results_at: int,
    ) -> None:  # fmt: skip
        """Attention of rows first_row to first_row + `rows` - 1 of a key/value head over positions low to high - 1.

        queries_at, pages_at, scratch_at: addresses of the queries, float32 (head_dim, rows), of the pages' addresses,
        int64, and of scratch, float32. key_index, value_index: see `store_key`, `store_value`. start: the first token's
        position. Scratch receives the scores (rows, SCORE_BLOCK); results_at, float32, the accumulator (rows,
        head_dim), row_max (rows,) and denominator (rows,).
        """
        queries = memory(queries_at, dim * rows, np.float32)
        pages = memory(pages_at, (high + PAGE - 1) // PAGE, np.int64)
        scores = memory(scratch_at, rows * SCORE_BLOCK, np.float32)
        accumulator, row_max, denominator = results(results_at, rows, dim)
        for block in range(low, high, SCORE_BLOCK):
            count = (min(SCORE_BLOCK, high - block) + POSITION_TILE - 1) // POSITION_TILE * POSITION_TILE
            page = pages[block // PAGE]
            keys = memory(page + size * PAGE * dim * key_index, PAGE * dim, dtype)
            values = memory(page + size * PAGE * dim * value_index, PAGE * dim, dtype)
            at = block % PAGE * dim
            _compute_scores(rows, score_vectors, together, kind, far, queries, keys, values, at, count, dim, scores)
            for row in range(rows):
                visible = max(0, min(count, start + (first_row + row) // group + 1 - block))
                softmax(scores, row, visible, dim, row_max, denominator, accumulator)
            _add_weighted_values(
                rows, wide_vectors, narrow_vectors, kind, far, scores, keys, values, at, count, dim, accumulator
            )

    return attend
