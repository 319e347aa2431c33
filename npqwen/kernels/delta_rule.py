"""The gated delta rule of one value head, on its state as it lies in memory (npqwen/kernels/gated_delta.py).

The state is computed by blocks of 16 value coordinates. Each token sweeps over a block once: it updates a row, and
multiplies the updated row by the next token's key and query while it is in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.simd.llvm import CACHE_LINE
from npqwen.simd.recurrence import (
    ROW,
    ROWS_AT_ONCE,
    copy_block,
    dot_rows,
    finish_token,
    stream_block,
    stream_rows,
    update_dot_rows,
    update_rows,
)
from npqwen.simd.scalar import memory
from npqwen.simd.tile import LANES, prefetch, zeros

GROUP = 16
"""Tokens whose inputs are computed at once, to stay in the first-level cache with a part of the state."""
BLOCKS = 2 if LANES == ROW else 1
"""Blocks that are computed side by side: they share the loads of keys, and independent sums hide latency, if registers
hold them."""
NARROW = ROW // LANES
WIDE = BLOCKS * NARROW
"""Vectors of a row of one block, and of the blocks computed side by side."""
_LINES = ROWS_AT_ONCE * CACHE_LINE


@njit(inline="always")
def copy(source_at: int, target_at: int, size: int, streams: bool) -> None:
    """Copy `size` float32, a multiple of 16; if `streams`, non-temporally, to a target aligned to a cache line."""
    source, target = memory(source_at, size, np.float32), memory(target_at, size, np.float32)
    if streams:
        for i in range(0, size, ROW):
            stream_block(source, target, i)
    else:
        for i in range(0, size, ROW):
            copy_block(source, target, i)


@njit(inline="always")
def recur_once(
    source_at: int, target_at: int, key_dim: int, inputs: Any, dim: int, values: Any, gates: Any, out: Any
) -> None:
    """One token's outputs, and the state after it.

    Memory is the limit: a block is written with non-temporal stores while the next one is read, and the one after that
    prefetched. Arguments as those of `recur`, which computes the same; target_at: aligned to a cache line.
    """
    size = key_dim * ROW
    source, target = memory(source_at, key_dim * dim, np.float32), memory(target_at, key_dim * dim, np.float32)
    decay = gates[0]
    sums = zeros(2, NARROW, ROWS_AT_ONCE)
    for k in range(0, key_dim, ROWS_AT_ONCE):
        prefetch(source, size + k * ROW, _LINES)
        sums = dot_rows(sums, source, k * ROW, 0, inputs, k, key_dim + k)
    for block in range(dim // ROW):
        at, place = block * size, block * ROW
        deltas = finish_token(sums, values, place, gates, 0, GROUP, 2 * GROUP, out, place)
        sums = zeros(2, NARROW, ROWS_AT_ONCE)
        if place + ROW < dim:
            for k in range(0, key_dim, ROWS_AT_ONCE):
                row = at + k * ROW
                prefetch(source, row + 2 * size, _LINES)
                sums = dot_rows(sums, source, row + size, 0, inputs, k, key_dim + k)
                stream_rows(deltas, decay, source, row, target, row, 0, inputs, k)
        else:
            for k in range(0, key_dim, ROWS_AT_ONCE):
                row = at + k * ROW
                stream_rows(deltas, decay, source, row, target, row, 0, inputs, k)


@njit(inline="always")
def recur(
    vectors: int, count: int, kept: int, source_at: int, work_at: int, target_at: int, streams: bool, key_dim: int,
    inputs: Any, dim: int, values: Any, at: int, gates: Any, out: Any,
) -> None:  # fmt: skip
    """The outputs of `count` tokens, and the state after the first `kept`, of value blocks starting at coordinate `at`.

    vectors: those of a row of these blocks, a constant. source_at, target_at: addresses of the blocks before the tokens
    and after the kept ones; if none is kept, nothing is written to target_at. work_at: the address of as many float32,
    for the intermediate states; it may be target_at if all tokens are kept. streams: whether target_at is aligned to a
    cache line and will not be read soon. inputs: each token's key and query. values, out: (tokens, dim), flat. gates:
    `GROUP` decays, betas, and products of key and query.
    """
    kept = min(kept, count)
    pitch = key_dim * ROW
    size = vectors // NARROW * pitch
    source, target = memory(source_at, size, np.float32), memory(target_at, size, np.float32)
    work = memory(work_at, size, np.float32)
    sums = zeros(2, vectors, ROWS_AT_ONCE)
    for k in range(0, key_dim, ROWS_AT_ONCE):
        for block in range(vectors // NARROW):
            prefetch(source, size + block * pitch + k * ROW, _LINES)
        sums = dot_rows(sums, source, k * ROW, pitch, inputs, k, key_dim + k)
    for t in range(count):
        deltas = finish_token(sums, values, t * dim + at, gates, t, GROUP + t, 2 * GROUP + t, out, t * dim + at)
        key, decay = 2 * key_dim * t, gates[t]
        if t < count - 1:
            following = key + 2 * key_dim
            sums = zeros(2, vectors, ROWS_AT_ONCE)
            for k in range(0, key_dim, ROWS_AT_ONCE):
                sums = update_dot_rows(
                    sums, deltas, decay, source, k * ROW, work, k * ROW, pitch, inputs, key + k, following + k,
                    following + key_dim + k,
                )  # fmt: skip
            if t == kept - 1:
                copy(work_at, target_at, size, streams)
        elif t == kept - 1:
            if streams:
                for k in range(0, key_dim, ROWS_AT_ONCE):
                    stream_rows(deltas, decay, source, k * ROW, target, k * ROW, pitch, inputs, key + k)
            else:
                for k in range(0, key_dim, ROWS_AT_ONCE):
                    update_rows(deltas, decay, source, k * ROW, target, k * ROW, pitch, inputs, key + k)
        source = work
