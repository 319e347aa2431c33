"""out = weight @ x for every encoding of the format: the kernels that do nearly all of the work.

A thread claims a few row groups (of 16 rows) at a time and multiplies them by one tile of tokens after another, with
the sums in registers. With one token, this reads every weight once, at memory speed; with many, each weight is unpacked
once per tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from npqwen.format.encodings import CODEBOOK_BYTES, ENCODINGS, UNIT_BLOCKS, UNIT_COLUMNS, UNIT_ROWS, Encoding
from npqwen.kernels.amx_matmul import AMX_ROOM_BYTES, amx_rows
from npqwen.kernels.compiled import address_of
from npqwen.kernels.entry import entry, run_at
from npqwen.kernels.matrix import IS_INTEGER, group_bytes
from npqwen.kernels.packing import PANELS_WIDTH, WIDEST, WIDTHS, whole_tiles
from npqwen.kernels.pieces import MEMBERS, claim_private, finish_first
from npqwen.kernels.prompt_matmul import PROMPT_WIDTH, prompt_bytes, prompt_rows
from npqwen.kernels.unpacked_matmul import (
    PANEL_BYTES,
    panel_rows,
    run_unpacked,
    unpack_rows,
    unpacked_bytes,
    unpacked_rows,
)
from npqwen.simd.instructions import PREFETCH_DISTANCE
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import CACHE_LINE
from npqwen.simd.packed import block_bytes
from npqwen.simd.scalar import memory
from npqwen.simd.tile import (
    BFLOAT16,
    LANES,
    chains,
    dot_block_int,
    load_codebook,
    multiply_add_column,
    prefetch,
    scale_rows,
    store,
    store_add,
    store_add_tiles,
    store_tiles,
    zeros,
)

_MATRICES = ISA.matrices
CHUNK_BYTES = 1 << 17
"""Bytes of weights that a thread claims at a time: they stay in its cache for all tiles of tokens."""
STREAM_BYTES = 1 << 19
"""Bytes of a chunk if there is only one tile: weights are read once, and every chunk starts by waiting for memory."""
_UNPACK_FROM = ISA.unpack_from
_LOCAL_FLOATS = 1 << 16
"""float32 of a thread's private results: few enough to stay in its cache."""
OVERWRITE, ACCUMULATE = map(np.int64, range(2))
"""Whether products replace what `out` holds or are added to it. int64: Numba compiles a function again for every
literal int among the arguments of its calls."""
_LINE_COLUMNS = CACHE_LINE // (2 * UNIT_ROWS)
"""Columns of bf16 in a cache line."""


def _integer_rows(encoding: Encoding, tokens: int) -> Any:
    """The kernel for weights of an integer encoding and tiles of `tokens` tokens."""
    vectors = ISA.tiles[tokens]
    rows = vectors * LANES
    code, unit, block_size = encoding.code, encoding.unit_bytes, encoding.block_bytes
    row_scale_bytes, scale_bytes = encoding.row_scale_bytes, encoding.scale_bytes
    x_block = block_bytes(tokens, ISA.start_bytes)
    # Prefetching line by line between loads gives 10% more bandwidth than prefetching a whole unit first: where the
    # instruction set does so, only the scales are left to prefetch here.
    halves = not ISA.prefetches
    prefetched = unit // 2 if halves else scale_bytes

    @entry(encoding.name, tokens, vectors)
    def integer_rows(
        address: int, codebook: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int,
        accumulate: int, scratch: int,
    ) -> None:  # fmt: skip
        group_bytes = row_scale_bytes + units * unit
        w = memory(address, last * group_bytes, np.uint8)
        packed = memory(x, tiles * units * UNIT_BLOCKS * x_block, np.uint8)
        results = memory(out, tiles * tokens * stride, np.float32)
        table = load_codebook(code, memory(codebook, CODEBOOK_BYTES, np.uint8))
        for tile in range(tiles):
            for group in range(first, last):
                for row in range(0, UNIT_ROWS, rows):
                    sums = zeros(tokens, vectors, 1)
                    at = group * group_bytes + row_scale_bytes
                    scales_at = at + row
                    block_at = at + scale_bytes + 4 * row
                    x_at = tile * units * UNIT_BLOCKS * x_block
                    # Two blocks per iteration: with four, LLVM would hoist loads and run out of registers.
                    for half in range(2 * units):
                        ahead = block_at - scale_bytes + PREFETCH_DISTANCE
                        if not halves and half % 2:  # the line of scales is prefetched already
                            ahead = scales_at
                        prefetch(w, ahead, prefetched)
                        sums = dot_block_int(sums, tokens, code, table, w, block_at, scales_at, packed, x_at)
                        x_at += x_block
                        sums = dot_block_int(
                            sums, tokens, code, table, w, block_at + block_size, scales_at + UNIT_ROWS, packed, x_at
                        )
                        x_at += x_block
                        # The second half ends the unit.
                        block_at += 2 * block_size + half % 2 * scale_bytes
                        scales_at += 2 * UNIT_ROWS + half % 2 * (unit - scale_bytes)
                    sums = scale_rows(sums, vectors, w, group * group_bytes + 4 * row)
                    place = tile * tokens * stride + group * UNIT_ROWS + row
                    if accumulate:
                        store_add(sums, results, place, vectors, stride)
                    else:
                        store(sums, results, place, vectors, stride)

    return integer_rows


_TOGETHER = tuple(chains(width * ISA.tiles.get(width, 1)) if width else 1 for width in range(WIDEST + 1))
"""Row groups that the kernels for bf16 multiply at once, by the width of the tile: independent sums hide the latency of
multiply-adds. Several sums per row would, too, but then a token's results would depend on the width."""


def _bf16_rows(tokens: int) -> Any:
    """The kernel for bf16 weights, float32 activations and tiles of `tokens` tokens."""
    vectors, together = ISA.tiles[tokens], _TOGETHER[tokens]
    rows = vectors * LANES

    @entry(tokens, vectors)
    def bf16_rows(
        address: int, codebook: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int,
        accumulate: int, scratch: int,
    ) -> None:  # fmt: skip
        cols = units * UNIT_COLUMNS
        w = memory(address, last * UNIT_ROWS * cols, np.uint16)
        packed = memory(x, tiles * cols * tokens, np.float32)
        results = memory(out, tiles * tokens * stride, np.float32)
        rest = last - (last - first) % together
        for tile in range(tiles):
            x_at, origin = tile * cols * tokens, tile * tokens * stride
            for group in range(first, rest, together):
                for row in range(0, UNIT_ROWS, rows):
                    at, place = group * cols * UNIT_ROWS + row, origin + group * UNIT_ROWS + row
                    sums = _bf16_groups(tokens, vectors, together, w, at, cols, packed, x_at)
                    if accumulate:
                        store_add_tiles(sums, together, results, place, UNIT_ROWS, vectors, stride)
                    else:
                        store_tiles(sums, together, results, place, UNIT_ROWS, vectors, stride)
            for group in range(rest, last):
                for row in range(0, UNIT_ROWS, rows):
                    at, place = group * cols * UNIT_ROWS + row, origin + group * UNIT_ROWS + row
                    lone = _bf16_groups(tokens, vectors, 1, w, at, cols, packed, x_at)
                    if accumulate:
                        store_add(lone, results, place, vectors, stride)
                    else:
                        store(lone, results, place, vectors, stride)

    return bf16_rows


@njit(inline="always")
def _bf16_groups(tokens: int, vectors: int, together: int, w: Any, at: int, cols: int, packed: Any, x_at: int) -> Any:
    """A tile for each of `together` row groups: the rows at w[at:] of the first, and the same rows of the others.

    tokens, vectors and together are constants.
    """
    sums = zeros(tokens, vectors, together)
    pitch = cols * UNIT_ROWS
    for _ in range(cols // _LINE_COLUMNS):
        for group in range(together):
            prefetch(w, at + group * pitch + PREFETCH_DISTANCE // 2, CACHE_LINE)
        for _ in range(_LINE_COLUMNS):
            sums = multiply_add_column(sums, tokens, together, BFLOAT16, w, at, pitch, packed, x_at, 1)
            at += UNIT_ROWS
            x_at += tokens
    return sums


def _rows(encoding: Encoding, tokens: int) -> Any:
    if not encoding.is_integer:
        return _bf16_rows(tokens)
    return amx_rows(encoding) if _MATRICES and tokens == UNIT_ROWS else _integer_rows(encoding, tokens)


KERNELS = tuple({width: _rows(encoding, width) for width in WIDTHS} for encoding in ENCODINGS)
"""The kernels by the code of the encoding, then by the width of a tile.

A kernel multiplies row groups first to last - 1 of the matrix at `address`, of `units` units per group and with the
codebook at `codebook` (0 in encodings that have none), by `tiles` tiles of packed activations at x. The results go to
float32 at `out`, `stride` of them per token, and are added to those already there if `accumulate` is 1 (0: replace
them). scratch: the address of `scratch_floats` float32.
"""


UNPACKERS = {
    encoding.code: unpack_rows(encoding)
    for encoding in ENCODINGS
    if ISA.unpack_from and encoding.is_integer and encoding.bits < 8
}
"""Kernels that unpack, by the code of the encoding."""
PANELS = {
    encoding.code: panel_rows(encoding, PANELS_WIDTH)
    for encoding in ENCODINGS
    if PANELS_WIDTH and encoding.is_integer and encoding.bits < 8
}
"""Kernels that unpack panels for tiles of PANELS_WIDTH tokens, by the code of the encoding."""
MULTIPLIER = unpacked_rows(WIDEST)
"""The kernel for unpacked weights and the widest tiles."""
PROMPT_KERNELS = {
    encoding.code: prompt_rows(encoding) for encoding in ENCODINGS if PROMPT_WIDTH and encoding.is_integer
}
"""Kernels for tiles of PROMPT_WIDTH tokens, by the code of the encoding."""
_SHARED, _PANELS, _PROMPTS = len(ENCODINGS), WIDEST + 1, WIDEST + 2
KERNEL_TABLE = (len(ENCODINGS) + 1, WIDEST + 3)
"""Shape of `matmul_kernels`."""


def matmul_kernels(encodings: Iterable[int]) -> NDArray[np.int64]:
    """Addresses of the kernels of some encodings (codes), compiled or loaded: [code, width], 0 where there is none.

    [code, 0] is that of an encoding's kernel of UNPACKERS, [code, WIDEST + 1] that of PANELS, [code, WIDEST + 2] that
    of PROMPT_KERNELS, and [len(ENCODINGS), WIDEST] that of MULTIPLIER.
    """
    addresses = np.zeros(KERNEL_TABLE, np.int64)
    for code in encodings:
        for width, kernel in KERNELS[code].items():
            addresses[code, width] = address_of(kernel)
        if code in PANELS:
            addresses[code, _PANELS] = address_of(PANELS[code])
        if code in PROMPT_KERNELS:
            addresses[code, _PROMPTS] = address_of(PROMPT_KERNELS[code])
        if code in UNPACKERS:
            addresses[code, 0], addresses[_SHARED, WIDEST] = address_of(UNPACKERS[code]), address_of(MULTIPLIER)
    return addresses


def scratch_floats(cols: int, multiple: int = 1) -> int:
    """float32 that a thread may need for a matrix of `cols` columns, claiming at least `multiple` row groups."""
    room = AMX_ROOM_BYTES if _MATRICES else 0
    unpacked = max(unpacked_bytes(multiple * cols, CHUNK_BYTES), PANEL_BYTES) + room
    return max(unpacked, prompt_bytes(multiple * cols, CHUNK_BYTES)) // 4


def local_floats(tokens: int, multiple: int) -> int:
    """float32 that hold the results of a chunk (`local_chunk`)."""
    return max(_LOCAL_FLOATS, tokens * multiple * UNIT_ROWS)


@njit(nogil=True)
def chunk_groups(team: Any, matrix: Any, groups: int, tokens: int, width: int) -> int:
    """How many of `groups` row groups a thread claims at a time: an eighth of its share, at most a chunk."""
    streams = tokens <= width and not (_MATRICES and width == UNIT_ROWS)  # unpacked weights have to fit scratch
    members, size = team[MEMBERS], group_bytes(matrix)
    chunk = max(1, min(groups // (8 * members), (STREAM_BYTES if streams else CHUNK_BYTES) // size))
    if not IS_INTEGER[matrix.encoding]:
        rounded = (chunk + _TOGETHER[width] - 1) // _TOGETHER[width] * _TOGETHER[width]
        if rounded * size <= STREAM_BYTES and rounded * members <= groups:
            return rounded
    return chunk


@njit(nogil=True)
def local_chunk(team: Any, matrix: Any, groups: int, tokens: int, width: int, local: Any, multiple: int) -> int:
    """How many row groups a thread claims at a time to keep their results in `local`: a multiple of `multiple`.

    groups: the row groups of the matrix, or of it and other matrices with the same input together. local: this thread's
    float32, flat, `local_floats`, for the results of all tokens, rounded up to whole tiles.
    """
    fitting = local.size // (whole_tiles(tokens, width) * UNIT_ROWS)
    return max(multiple, min(chunk_groups(team, matrix, groups, tokens, width), fitting) // multiple * multiple)


@njit(nogil=True)
def run_kernel(
    kernels: Any, matrix: Any, address: int, width: int, tiles: int, x: int, first: int, last: int, out: int,
    stride: int, accumulate: int, scratch: Any,
) -> None:  # fmt: skip
    """Run the kernel for tiles of `width` tokens on a matrix like `matrix` at an address; arguments as for KERNELS."""
    unpack = kernels[matrix.encoding, 0]
    if unpack and width == WIDEST and tiles >= _UNPACK_FROM:
        run_unpacked(
            unpack, kernels[_SHARED, WIDEST], matrix.encoding, address, matrix.codebook, matrix.cols, tiles, x, first,
            last, out, stride, accumulate, scratch,
        )  # fmt: skip
        return
    kernel = kernels[matrix.encoding, _PROMPTS if width == PROMPT_WIDTH else width]
    if kernels[matrix.encoding, _PANELS] and width == PANELS_WIDTH and tiles > 1:
        kernel = kernels[matrix.encoding, _PANELS]
    run_at(
        kernel,
        (
            address, matrix.codebook, matrix.cols // UNIT_COLUMNS, first, last, x, tiles, out, stride, accumulate,
            scratch.ctypes.data,
        ),
    )  # fmt: skip


@njit(nogil=True)
def multiply_local_rows(
    kernels: Any, matrix: Any, x: Any, tokens: int, width: int, first: int, last: int, scratch: Any, out: Any
) -> None:
    """out[t, r] = sum over c of weight[16 * first + r, c] * x[t, c] for row groups first to last - 1, by this thread
    alone.

    out: float32, flat, (tokens rounded up to whole tiles) x 16 * (last - first).
    """
    tiles = whole_tiles(tokens, width) // width
    multiply_rows_at(kernels, matrix, matrix.address, np.int64(x.ctypes.data), tiles, width, first, last, scratch, out)


@njit(nogil=True)
def multiply_rows_at(
    kernels: Any, matrix: Any, address: int, x_at: int, tiles: int, width: int, first: int, last: int, scratch: Any,
    out: Any,
) -> None:  # fmt: skip
    """`multiply_local_rows` of a matrix like `matrix` at an address, and of `tiles` tiles of activations at x_at."""
    # Kernels count rows from the matrix's first.
    origin = out.ctypes.data - out.itemsize * UNIT_ROWS * first
    stride = UNIT_ROWS * (last - first)
    run_kernel(kernels, matrix, address, width, tiles, x_at, first, last, origin, stride, 0, scratch)


@njit(nogil=True)
def matmul(
    team: Any, kernels: Any, matrix: Any, x: Any, tokens: int, width: int, out: Any, accumulate: int, scratch: Any,
    local: Any,
) -> None:  # fmt: skip
    """out[t, r] = sum over c of weight[r, c] * x[t, c], or += if accumulate (0 or 1), for t < tokens.

    All members of the team call it, and share the rows.
    kernels: see `matmul_kernels`. matrix: a MATRIX. x: packed for its encoding, `width` tokens per tile. out: float32
    (at least tokens, matrix.rows or more); if it has fewer columns (a multiple of 16), only that many rows of the
    matrix are multiplied. scratch, local: this thread's float32, `scratch_floats(matrix.cols)` and
    `local_floats(tokens, 1)`.
    """
    groups = min(matrix.rows, out.shape[1]) // UNIT_ROWS
    chunk = local_chunk(team, matrix, groups, tokens, width, local, np.int64(1))
    pieces = (groups + chunk - 1) // chunk
    while True:
        piece = claim_private(team, pieces)
        if piece == pieces:
            return
        first, last = chunk * piece, min(chunk * (piece + 1), groups)
        multiply_local_rows(kernels, matrix, x, tokens, width, first, last, scratch, local)
        if finish_first(team):
            write_rows(local, first, last, tokens, out, accumulate)


@njit(nogil=True)
def multiply_groups(
    team: Any, kernels: Any, matrix: Any, groups: Any, x: Any, tokens: int, width: int, out: Any, scratch: Any,
    local: Any,
) -> None:  # fmt: skip
    """out[t] = the rows of some row groups, one group after another, @ x[t]; bitwise equal to those of `matmul`.

    groups: int64, numbers of row groups. out: float32 (at least tokens, 16 * groups.size). Other arguments as for
    `matmul`.
    """
    while True:
        i = claim_private(team, groups.size)
        if i == groups.size:
            return
        group = groups[i]
        multiply_local_rows(kernels, matrix, x, tokens, width, group, group + 1, scratch, local)
        if finish_first(team):
            write_rows(local, i, i + 1, tokens, out, OVERWRITE)


@njit(nogil=True)
def write_rows(local: Any, first: int, last: int, tokens: int, out: Any, accumulate: int) -> None:
    """Write results of row groups first to last - 1, or add them if accumulate (0 or 1), to the first rows of `out`.

    local: float32, flat, tokens * 16 * (last - first). out: float32 (at least tokens, rows of the matrix).
    """
    rows = UNIT_ROWS * (last - first)
    for t in range(tokens):
        source, target = local[t * rows : (t + 1) * rows], out[t, UNIT_ROWS * first : UNIT_ROWS * last]
        if accumulate:
            for r in range(rows):
                target[r] += source[r]
        else:
            for r in range(rows):
                target[r] = source[r]
