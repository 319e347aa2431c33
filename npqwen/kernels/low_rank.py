"""Low-rank adapters (Hu et al., 2021, "LoRA"): out += B @ (A @ x) beside a matrix, with A and B of the token's adapter.

Two steps: `shrink` computes A @ x for all matrices that read x, stacked, and `add_low_rank` adds B @ (A @ x) to the
rows that a thread has just multiplied, while they are in its cache. A token's sums are bitwise equal whatever else is
in the pass: their order depends only on the sizes.

Factors are bf16. A: PARTS ranges of x's columns, padding included; each range has groups of 16 ranks, each of them
column by column. B: groups of 16 rows, each column by column, `rank` columns, already multiplied by the adapter's
scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from npqwen.format.encodings import UNIT_ROWS
from npqwen.kernels.compiled import address_of
from npqwen.kernels.entry import entry, run_at
from npqwen.kernels.matmul import local_chunk, multiply_local_rows, write_rows
from npqwen.kernels.pieces import MEMBERS, claim, claim_private, finish_first
from npqwen.simd.instructions import PREFETCH_DISTANCE
from npqwen.simd.scalar import bits_float, memory
from npqwen.simd.tile import (
    BFLOAT16,
    LANES,
    add,
    chains,
    load,
    multiply_add_column,
    prefetch,
    store,
    store_add,
    store_add_tiles,
    zeros,
)

ATTENTION_INPUT, ATTENDED, MLP_INPUT, GATED, SHARED_GATE_INPUT = map(np.int64, range(5))
"""Inputs of a layer's adapted matrices; in a sparse layer, MLP_INPUT is that of the router and the shared expert.

int64, as are all such constants here: Numba compiles a function again for every literal int among the arguments of its
calls.
"""
INPUTS = 5
Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ, ROUTER = map(np.int64, range(8))
"""A layer's adapted matrices, except those of experts; in a sparse layer GATE_PROJ, UP_PROJ and DOWN_PROJ are the
shared expert's, in a Gated DeltaNet layer O_PROJ is out_proj."""
Q_GATE, IN_PROJ_QKV, IN_PROJ_Z, IN_PROJ_B, IN_PROJ_A, SHARED_GATE = map(np.int64, range(8, 14))
"""Further adapted matrices of hybrid models."""
MATRICES = 14
FIRST, SECOND = map(np.int64, range(2))
"""The row group of a stored matrix at which those of an adapted one begin."""
ALONE, PAIRED = map(np.int64, range(1, 3))
"""The stride of the adapted one's row groups in the stored one: PAIRED ones alternate with those of another matrix."""
WIDE = 4
"""Tokens of the wider of the two tiles, which reads factors once for all of them; the other tile is a single token."""
PARTS = 4
"""Ranges of A's columns: a token's result is the sum of their partial sums. With few tokens, threads share them."""
_FEW_TILES = 8
"""Most tiles of tokens for which threads share the ranges."""
_CHAINS = 4
"""Independent sums of a range: column n of it adds to the sum n % 4."""
_CHAIN_BYTES = 2 * _CHAINS * UNIT_ROWS
"""Bytes of a group's columns that one iteration reads: one for each chain."""
_VECTORS = UNIT_ROWS // LANES


@njit(inline="always")
def _part_of_one(tokens: int, w: Any, at: int, first: int, count: int, x: Any, stride: int) -> Any:
    """The sums over columns first to first + count - 1 of one token's x (tokens is 1), all chains side by side.

    w[at:] has these columns of a group of 16 ranks.
    """
    a, b = zeros(1, _VECTORS, 1), zeros(1, _VECTORS, 1)
    c, d = zeros(1, _VECTORS, 1), zeros(1, _VECTORS, 1)
    for column in range(first, first + count, _CHAINS):
        prefetch(w, at + PREFETCH_DISTANCE // 2, _CHAIN_BYTES)
        a = multiply_add_column(a, 1, 1, BFLOAT16, w, at, 0, x, column, 0)
        b = multiply_add_column(b, 1, 1, BFLOAT16, w, at + UNIT_ROWS, 0, x, column + 1, 0)
        c = multiply_add_column(c, 1, 1, BFLOAT16, w, at + 2 * UNIT_ROWS, 0, x, column + 2, 0)
        d = multiply_add_column(d, 1, 1, BFLOAT16, w, at + 3 * UNIT_ROWS, 0, x, column + 3, 0)
        at += _CHAINS * UNIT_ROWS
    return add(add(a, b), add(c, d))


@njit(inline="always")
def _part(tokens: int, w: Any, at: int, first: int, count: int, x: Any, stride: int) -> Any:
    """`_part_of_one` for several tokens, one chain after the other: a tile of them has enough independent sums.

    tokens: a constant. stride: float32 between tokens of x.
    """
    a = _chain(tokens, w, at, first, count, x, stride, _CHAIN_BYTES)
    b = _chain(tokens, w, at + UNIT_ROWS, first + 1, count, x, stride, 0)
    a = add(a, b)
    b = _chain(tokens, w, at + 2 * UNIT_ROWS, first + 2, count, x, stride, 0)
    c = _chain(tokens, w, at + 3 * UNIT_ROWS, first + 3, count, x, stride, 0)
    return add(a, add(b, c))


@njit(inline="always")
def _chain(tokens: int, w: Any, at: int, first: int, count: int, x: Any, stride: int, ahead: int) -> Any:
    """One chain. tokens, ahead: constants; the latter is how many bytes to prefetch for each column."""
    sums = zeros(tokens, _VECTORS, 1)
    for n in range(0, count, _CHAINS):
        prefetch(w, at + n * UNIT_ROWS + PREFETCH_DISTANCE // 2, ahead)
        sums = multiply_add_column(sums, tokens, 1, BFLOAT16, w, at + n * UNIT_ROWS, 0, x, first + n, stride)
    return sums


def _shrink_rows(tokens: int) -> Any:
    """The kernel that computes A @ x for tiles of `tokens` tokens."""

    @entry(tokens)
    def shrink_rows(
        a: int, groups: int, columns: int, first: int, last: int, x: int, x_stride: int, out: int, out_stride: int
    ) -> None:
        w = memory(a, columns * groups * UNIT_ROWS, np.uint16)
        activations = memory(x, (tokens - 1) * x_stride + columns, np.float32)
        results = memory(out, (tokens - 1) * out_stride + groups * UNIT_ROWS, np.float32)
        size = columns // PARTS
        for n in range(first, last):
            for group in range(groups):
                at = (n * groups + group) * size * UNIT_ROWS
                if tokens == 1:  # Numba compiles one branch only
                    sums = _part_of_one(tokens, w, at, size * n, size, activations, x_stride)
                else:
                    sums = _part(tokens, w, at, size * n, size, activations, x_stride)
                if n > first:
                    sums = add(load(sums, results, group * UNIT_ROWS, _VECTORS, out_stride), sums)
                store(sums, results, group * UNIT_ROWS, _VECTORS, out_stride)

    return shrink_rows


def _expand_rows(tokens: int) -> Any:
    """The kernel that adds B @ y for tiles of `tokens` tokens."""
    together = chains(tokens * _VECTORS)
    column_bytes = 2 * together * UNIT_ROWS

    @entry(tokens)
    def expand_rows(
        b: int, rank: int, groups: int, y: int, y_stride: int, out: int, out_stride: int, pitch: int
    ) -> None:
        w = memory(b, groups * rank * UNIT_ROWS, np.uint16)
        reduced = memory(y, (tokens - 1) * y_stride + rank, np.float32)
        results = memory(out, (tokens - 1) * out_stride + (groups - 1) * pitch + UNIT_ROWS, np.float32)
        size = rank * UNIT_ROWS
        rest = groups - groups % together
        for group in range(0, rest, together):
            at = group * size
            sums = zeros(tokens, _VECTORS, together)
            for k in range(rank):
                prefetch(w, at + k * together * UNIT_ROWS + PREFETCH_DISTANCE // 2, column_bytes)
                sums = multiply_add_column(
                    sums, tokens, together, BFLOAT16, w, at + k * UNIT_ROWS, size, reduced, k, y_stride
                )
            store_add_tiles(sums, together, results, group * pitch, pitch, _VECTORS, out_stride)
        for group in range(rest, groups):
            at = group * size
            lone = zeros(tokens, _VECTORS, 1)
            for k in range(rank):
                lone = multiply_add_column(lone, tokens, 1, BFLOAT16, w, at + k * UNIT_ROWS, 0, reduced, k, y_stride)
            store_add(lone, results, group * pitch, _VECTORS, out_stride)

    return expand_rows


SHRINK = {1: _shrink_rows(1), WIDE: _shrink_rows(WIDE)}
"""The kernels by tokens per tile. out = A @ x for `groups` groups of 16 ranks, over parts first to last - 1 of the
columns. a, x, out: addresses of bf16 (a) and float32; strides, between tokens, count float32."""
EXPAND = {1: _expand_rows(1), WIDE: _expand_rows(WIDE)}
"""The kernels by tokens per tile. out += B @ y for `groups` groups of 16 rows, which are `pitch` float32 apart in out;
addresses and strides as for SHRINK."""


def low_rank_kernels() -> NDArray[np.int64]:
    """Addresses of the kernels, compiled or loaded: (2, WIDE + 1), [0] those of SHRINK and [1] those of EXPAND."""
    addresses = np.zeros((2, WIDE + 1), np.int64)
    for kind, kernels in enumerate((SHRINK, EXPAND)):
        for tokens, kernel in kernels.items():
            addresses[kind, tokens] = address_of(kernel)
    return addresses


@njit(nogil=True)
def rows_read(adapters: Any, layer: int, what: int) -> Any:
    """The array from which adapters of this pass read `what` (ATTENTION_INPUT, ...) of a layer, float32 (tokens,
    columns); without rows if none reads it."""
    rows = adapters.gated if what == GATED else adapters.normed
    return rows if adapters.tiles.shape[0] and adapters.most_groups[layer, what] else rows[:0]


@njit(nogil=True)
def shrink(team: Any, adapters: Any, layer: int, what: int, x: Any, columns: int) -> None:
    """adapters.reduced = A @ x for all matrices of a layer that read `what` (ATTENTION_INPUT, ...).

    adapters: an `npqwen.engine.records.Adapted`. x: float32 (tokens, at least `columns`). columns: of the matrices and
    of A, padding included.
    """
    tiles, reduced = adapters.tiles, adapters.reduced
    count = tiles.shape[0]
    if count == 0 or adapters.most_groups[layer, what] == 0:
        return
    parts = parts_of(team, count)
    pieces = count * parts
    while True:
        piece = claim(team, pieces)
        if piece == pieces:
            return
        tile, part = piece // parts, piece % parts
        adapter, token, tokens = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
        address, groups = adapters.shrinks[adapter, layer, what, 0], adapters.shrinks[adapter, layer, what, 1]
        if groups:
            shrink_tile(adapters.kernels, address, groups, columns, tokens, part, parts, x[token:], reduced[token:])


@njit(nogil=True)
def parts_of(team: Any, tiles: int) -> int:
    """The number of partial sums that make up a token's A @ x, in a pass of `tiles` tiles."""
    return PARTS if tiles <= _FEW_TILES and team[MEMBERS] > 1 else 1


@njit(nogil=True)
def shrink_tile(
    kernels: Any, address: int, groups: int, columns: int, tokens: int, part: int, parts: int, x: Any, reduced: Any
) -> None:
    """reduced[t, part] = one of `parts` parts of A @ x[t, :columns] for a tile of tokens."""
    run_at(
        kernels[0, tokens],
        (
            address, groups, columns, part, PARTS if parts == 1 else part + 1, x.ctypes.data, x.shape[1],
            reduced.ctypes.data + reduced.itemsize * part * reduced.shape[2], reduced.shape[1] * reduced.shape[2],
        ),
    )  # fmt: skip


@njit(nogil=True)
def own_groups(first: int, last: int, start: int, stride: int, groups: int) -> Any:
    """Which row groups of a matrix are among first to last - 1 of a stored one: (first, end). See `add_low_rank`."""
    return max(0, (first - start + stride - 1) // stride), min(groups, (last - start + stride - 1) // stride)


@njit(nogil=True)
def add_low_rank(
    team: Any, adapters: Any, layer: int, matrix: int, local: Any, first: int, last: int, start: int, stride: int,
    groups: int, scratch: Any,
) -> None:  # fmt: skip
    """Add the adapters' products for a matrix (Q_PROJ, ...) to results of row groups first to last - 1 of a stored one.

    The matrix's i-th row group is the stored one's start + i * stride; it has `groups` of them. local: float32, flat,
    tokens * 16 * (last - first). scratch: this thread's float32, 4 times the largest rank.
    """
    tiles, reduced = adapters.tiles, adapters.reduced
    begin, end = own_groups(first, last, start, stride, groups)
    if begin >= end:
        return
    parts = parts_of(team, tiles.shape[0])
    row = UNIT_ROWS * (last - first)
    for tile in range(tiles.shape[0]):
        adapter, token, tokens = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
        address, rank = adapters.expands[adapter, layer, matrix, 0], adapters.expands[adapter, layer, matrix, 1]
        if rank:
            at = adapters.expands[adapter, layer, matrix, 2]
            place = token * row + UNIT_ROWS * (start + begin * stride - first)
            expand(
                adapters.kernels, address + 2 * begin * rank * UNIT_ROWS, rank, at, end - begin, tokens, parts,
                reduced[token:], local[place:], row, UNIT_ROWS * stride, scratch,
            )  # fmt: skip


@njit(nogil=True)
def expand(
    kernels: Any, address: int, rank: int, at: int, groups: int, tokens: int, parts: int, reduced: Any, out: Any,
    stride: int, pitch: int, scratch: Any,
) -> None:  # fmt: skip
    """out += B @ (A @ x) for a tile of tokens; A @ x is the sum of reduced[t, :parts, at : at + rank]."""
    for t in range(tokens):
        line = scratch[t * rank : (t + 1) * rank]
        for k in range(rank):
            line[k] = reduced[t, 0, at + k]
        for part in range(1, parts):
            for k in range(rank):
                line[k] += reduced[t, part, at + k]
    run_at(
        kernels[1, tokens],
        (address, rank, groups, scratch.ctypes.data, rank, out.ctypes.data, stride, pitch),
    )


@njit(nogil=True)
def adapted_matmul(
    team: Any, kernels: Any, matrix: Any, x: Any, tokens: int, width: int, out: Any, accumulate: int, scratch: Any,
    local: Any, adapters: Any, layer: int, role: int,
) -> None:  # fmt: skip
    """`matmul` (npqwen/kernels/matmul.py) plus the adapters' products for the matrix (O_PROJ, ...); call `shrink` on
    its input first."""
    groups = matrix.rows // UNIT_ROWS
    adapted_pair(
        team, kernels, matrix, x, tokens, width, out, accumulate, scratch, local, adapters, layer, role, role, groups
    )


@njit(nogil=True)
def adapted_pair(
    team: Any, kernels: Any, matrix: Any, x: Any, tokens: int, width: int, out: Any, accumulate: int, scratch: Any,
    local: Any, adapters: Any, layer: int, role: int, other: int, split: int,
) -> None:  # fmt: skip
    """`adapted_matmul` of two matrices stored as one: that of `role`, and from row group `split`, that of `other`."""
    groups = min(matrix.rows, out.shape[1]) // UNIT_ROWS
    chunk = local_chunk(team, matrix, groups, tokens, width, local, np.int64(1))
    pieces = (groups + chunk - 1) // chunk
    while True:
        piece = claim_private(team, pieces)
        if piece == pieces:
            return
        first, last = chunk * piece, min(chunk * (piece + 1), groups)
        multiply_local_rows(kernels, matrix, x, tokens, width, first, last, scratch, local)
        add_low_rank(team, adapters, layer, role, local, first, last, FIRST, ALONE, split, scratch)
        add_low_rank(team, adapters, layer, other, local, first, last, split, ALONE, groups - split, scratch)
        if finish_first(team):
            write_rows(local, first, last, tokens, out, accumulate)


@njit(nogil=True)
def low_rank_scalar(team: Any, adapters: Any, layer: int, matrix: int, token: int) -> np.float32:
    """What a token's adapter adds to the token's product with a single-row matrix; call `shrink` on its input first."""
    total = np.float32(0.0)
    tiles, reduced = adapters.tiles, adapters.reduced
    if tiles.shape[0] == 0 or adapters.token_adapters[token] < 0:
        return total
    address, rank, at = adapters.expands[adapters.token_adapters[token], layer, matrix]
    b = memory(address, rank * UNIT_ROWS, np.uint16)
    parts = parts_of(team, tiles.shape[0])
    for k in range(rank):
        value = reduced[token, 0, at + k]
        for part in range(1, parts):
            value += reduced[token, part, at + k]
        total += bits_float(np.int32(b[k * UNIT_ROWS]) << np.int32(16)) * value
    return total
