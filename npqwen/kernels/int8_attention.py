"""Attention over keys and values of int8: the kernel for one key/value head and a tile of query rows.

Scores and weighted sums are int8 products, like those of a matrix of the encoding INT8 with activations. The queries
are packed once for all positions; weights, which are never negative, are multiplied by the scales of the values, then
rounded to 7 bits, 64 positions at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import BLOCK_COLUMNS, INT8, UNIT_ROWS
from npqwen.kernels.amx_attention import add_weighted_values_amx, compute_scores_amx
from npqwen.kernels.amx_matmul import AMX_ROOM_BYTES
from npqwen.kernels.cache_page import PAGE
from npqwen.kernels.entry import entry
from npqwen.kernels.int8_page import INT8_TILE, SCALES_BYTES, int8_tile_bytes, padded_dim, rotate_coordinates
from npqwen.kernels.online_softmax import SCORE_BLOCK, add_block, results
from npqwen.kernels.packing import pack_part
from npqwen.simd.amx import configure, release
from npqwen.simd.blocks import softmax_rows_int8
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import CACHE_LINE
from npqwen.simd.packed import block_bytes
from npqwen.simd.scalar import memory
from npqwen.simd.tile import LANES, add_weighted_lines, dot_block_int8, prefetch, scale_rows, store, store_add, zeros

BLOCKS = SCORE_BLOCK // INT8_TILE
_BLOCK_BYTES = UNIT_ROWS * BLOCK_COLUMNS
_START_BYTES = ISA.start_bytes
_CODE = np.int64(INT8.code)
_AMX_ROWS = UNIT_ROWS if ISA.matrices else 0
"""The number of rows whose products AMX computes; 0: none."""
_ROOM_BYTES = AMX_ROOM_BYTES if ISA.matrices else 0
WEIGHT_FLOATS = SCORE_BLOCK // 4 + 3 + (_ROOM_BYTES + CACHE_LINE) // 4 // UNIT_ROWS
"""float32 that hold a row's weights of SCORE_BLOCK positions as bytes, their scale, maximum and sum; and each row's
share of the sums of AMX."""


@njit(nogil=True, error_model="numpy")
def pack_queries(
    q: Any, first: int, head: int, group: int, rows: int, first_row: int, width: int, dim: int, scratch: Any, out: Any
) -> None:
    """out = the queries of `width` rows starting at first_row, rotated and packed; zeros past the last of `rows` rows.

    q: float32 (tokens, >= heads * dim), whose row `first` is the sequence's first token. scratch: float32, at least
    padded_dim(dim). out: float32, written as bytes (npqwen/simd/packed.py).
    """
    padded = padded_dim(dim)
    query, packed = scratch[:padded], memory(out.ctypes.data, 4 * out.size, np.uint8)
    for t in range(width):
        query[:] = np.float32(0.0)
        row = first_row + t
        if row < rows:
            at = (head * group + row % group) * dim
            line = q[first + row // group]
            for i in range(dim):
                query[i] = line[at + i]
            rotate_coordinates(query[:dim])
        pack_part(query, np.int64(0), padded, t, width, _CODE, packed)


# The parts of a kernel, inlined into it. rows and vectors are constants: see `int8_attention`.


@njit(inline="always")
def _compute_scores(
    rows: int, vectors: int, queries: Any, keys: Any, at: int, following: Any, following_at: int, count: int,
    padded: int, scores: Any,
) -> None:  # fmt: skip
    """scores[row, position] = queries[row] @ keys[position]; prefetches the following keys."""
    for position in range(0, count, INT8_TILE):
        tile = at + position * (padded + 4)
        prefetch(following, following_at + position * (padded + 4), SCALES_BYTES)
        for lane in range(0, INT8_TILE, vectors * LANES):
            products = zeros(rows, vectors, 1)
            k = tile + SCALES_BYTES + lane // UNIT_ROWS * UNIT_ROWS * padded + lane % UNIT_ROWS * 4
            x = 0
            for _ in range(0, padded, BLOCK_COLUMNS):
                for part in range(vectors * LANES // UNIT_ROWS or lane % UNIT_ROWS == 0):
                    prefetch(following, following_at + k - at + part * UNIT_ROWS * padded, _BLOCK_BYTES)
                products = dot_block_int8(products, rows, keys, k, UNIT_ROWS * padded, queries, x)
                k += _BLOCK_BYTES
                x += block_bytes(rows, _START_BYTES)
            products = scale_rows(products, vectors, keys, tile + 4 * lane)
            store(products, scores, position + lane, vectors, SCORE_BLOCK)


@njit(inline="always")
def _softmax(
    together: int, all_visible: bool, scores: Any, row: int, visible: int, dim: int, values: Any, at: int, padded: int,
    weights: Any, scales: Any, maxima: Any, totals: Any, row_max: Any, denominator: Any, accumulator: Any,
) -> None:  # fmt: skip
    """weights, scales = the softmax weights of `together` rows times the scales of the values, as integers.

    If a row's maximum grows, its denominator and accumulator are rescaled. all_visible: a constant; otherwise positions
    starting at index `visible` get no weight. maxima, totals: float32 (rows,), scratch.
    """
    softmax_rows_int8(
        together, all_visible, scores, row * SCORE_BLOCK, BLOCKS, visible, row_max, row, values, at,
        INT8_TILE * (padded + 4), weights, row * SCORE_BLOCK, maxima, totals, scales,
    )  # fmt: skip
    for i in range(row, row + together):
        add_block(maxima[i], totals[i], i, dim, row_max, denominator, accumulator)


@njit(inline="always")
def _add_weighted_values(
    rows: int, vectors: int, weights: Any, scales: Any, values: Any, at: int, following: Any, following_at: int,
    dim: int, padded: int, accumulator: Any,
) -> None:  # fmt: skip
    """accumulator[row] += scales[row] * weights[row] @ values; prefetches the following values."""
    for position in range(0, SCORE_BLOCK, INT8_TILE):
        prefetch(following, following_at + position * (padded + 4), SCALES_BYTES)
    for column in range(0, dim, vectors * LANES):
        v = at + SCALES_BYTES + column // UNIT_ROWS * _BLOCK_BYTES + column % UNIT_ROWS * 4
        if column % UNIT_ROWS == 0:
            for position in range(0, SCORE_BLOCK, INT8_TILE):
                prefetch(following, following_at + v - at + position * (padded + 4), _BLOCK_BYTES)
        sums = add_weighted_lines(
            zeros(rows, vectors, 1), rows, BLOCKS, values, v, INT8_TILE * (padded + 4), weights, SCORE_BLOCK, scales
        )
        store_add(sums, accumulator, column, vectors, dim)


def int8_attention(rows: int) -> Any:
    """The kernel for tiles of `rows` rows of queries."""
    # Scores: a vector holds positions. Weighted sums: it holds coordinates, whose number is a multiple of 16.
    score_vectors = max(1, min(INT8_TILE // LANES, ISA.accumulators // (2 * rows)))
    # Where a row's scores fill few registers, its steps wait for each other, unless interleaved with other rows'.
    together = min(rows, 8) if LANES == UNIT_ROWS else 1
    value_vectors = max(1, min(UNIT_ROWS // LANES, ISA.accumulators // (2 * rows)))

    @entry(rows, "int8", error_model="numpy")
    def attend(
        queries_at: int, dim: int, pages_at: int, key_index: int, value_index: int, low: int, high: int, start: int,
        first_row: int, group: int, scratch_at: int, results_at: int,
    ) -> None:  # fmt: skip
        """Attention of rows first_row to first_row + `rows` - 1 of a key/value head over positions low to high - 1.

        queries_at, pages_at, scratch_at: addresses of the packed queries, see `pack_queries`, of the pages' addresses,
        int64, and of scratch, float32. key_index, value_index: see `store_key`, `store_value`. start: the first token's
        position. Scratch receives scores, weights, the rows' scales, maxima and sums, and AMX's sums; results_at,
        float32, the accumulator (rows, head_dim), row_max (rows,) and denominator (rows,).
        """
        padded = padded_dim(dim)
        queries = memory(queries_at, padded // BLOCK_COLUMNS * block_bytes(rows, _START_BYTES), np.uint8)
        pages = memory(pages_at, (high + PAGE - 1) // PAGE, np.int64)
        scores = memory(scratch_at, rows * SCORE_BLOCK, np.float32)
        weights = memory(scratch_at + 4 * rows * SCORE_BLOCK, rows * SCORE_BLOCK, np.uint8)
        row_scratch = memory(scratch_at + 5 * rows * SCORE_BLOCK, 3 * rows, np.float32)
        scales, maxima, totals = row_scratch[:rows], row_scratch[rows : 2 * rows], row_scratch[2 * rows :]
        after = scratch_at + 5 * rows * SCORE_BLOCK + 12 * rows
        room = memory((after + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE, _ROOM_BYTES, np.uint8)
        accumulator, row_max, denominator = results(results_at, rows, dim)
        size = PAGE // INT8_TILE * int8_tile_bytes(dim)
        if rows == _AMX_ROWS:  # Numba compiles one branch only: both numbers are constants
            configure()
        for block in range(low, high, SCORE_BLOCK):
            count = (min(SCORE_BLOCK, high - block) + INT8_TILE - 1) // INT8_TILE * INT8_TILE
            page = pages[block // PAGE]
            keys = memory(page + size * key_index, size, np.uint8)
            values = memory(page + size * value_index, size, np.uint8)
            at = block % PAGE * (padded + 4)
            following = block + SCORE_BLOCK if block + SCORE_BLOCK < high else block
            page, following_at = pages[following // PAGE], following % PAGE * (padded + 4)
            next_keys = memory(page + size * key_index, size, np.uint8)
            next_values = memory(page + size * value_index, size, np.uint8)
            if rows == _AMX_ROWS:
                compute_scores_amx(
                    rows, score_vectors, queries, keys, at, next_keys, following_at, count, padded, scores, room
                )
            else:
                _compute_scores(
                    rows, score_vectors, queries, keys, at, next_keys, following_at, count, padded, scores
                )
            if start + first_row // group + 1 - block >= SCORE_BLOCK:
                for row in range(0, rows, together):
                    _softmax(
                        together, True, scores, row, SCORE_BLOCK, dim, values, at, padded, weights, scales, maxima,
                        totals, row_max, denominator, accumulator,
                    )  # fmt: skip
            else:
                for row in range(rows):
                    visible = max(0, min(count, start + (first_row + row) // group + 1 - block))
                    _softmax(
                        1, False, scores, row, visible, dim, values, at, padded, weights, scales, maxima, totals,
                        row_max, denominator, accumulator,
                    )  # fmt: skip
            if rows == _AMX_ROWS:
                add_weighted_values_amx(
                    rows, value_vectors, weights, scales, values, at, next_values, following_at, dim, padded,
                    accumulator, room,
                )  # fmt: skip
            else:
                _add_weighted_values(
                    rows, value_vectors, weights, scales, values, at, next_values, following_at, dim, padded,
                    accumulator,
                )  # fmt: skip
        if rows == _AMX_ROWS:
            release()

    return attend
