"""out = weight @ x for every encoding of the format: the kernels that do nearly all of the work.

A thread takes some groups of 16 rows at a time and multiplies each, a tile of tokens after the other, while the
sums stay in registers.  With one token that reads every weight once, at the memory's speed; with many,
each weight is unpacked once a tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from npqwen.format.encodings import ENCODINGS, Encoding
from npqwen.kernels.amx_matmul import amx_rows, unpacked_bytes
from npqwen.kernels.barrier import MEMBERS, acquire, claim
from npqwen.kernels.compiled import address_of
from npqwen.kernels.entry import entry, run_at
from npqwen.kernels.matrix import UNIT_COLS, unit_bytes
from npqwen.kernels.packing import BLOCK_BYTES, WIDEST, WIDTHS, whole_tiles
from npqwen.simd.instructions import AHEAD
from npqwen.simd.isa import ISA
from npqwen.simd.scalar import memory
from npqwen.simd.tile import (
    LANES,
    ROWS,
    add,
    chains,
    dot_block_int,
    multiply_bf16,
    prefetch,
    reduce_columns,
    store,
    zeros,
)

_MATRICES = ISA.matrices
CHUNK_BYTES = 1 << 17
"""Of weights that a thread takes at a time: they stay in its cache for all tiles of tokens."""
STREAM_BYTES = 1 << 19
"""The same for one tile, which reads them once: where a thread begins anew, memory has to be waited for."""

_PIECE = 1 << 16
"""float32 that a thread's results may take which it goes on with: they stay in its cache."""


def _integer_rows(encoding: Encoding, tokens: int) -> Any:
    """The kernel for weights of an integer encoding and tiles of `tokens` tokens."""
    vectors = ISA.tiles[tokens]
    rows = vectors * LANES
    code, unit, scale_bytes, half = encoding.code, encoding.unit_bytes, encoding.scale_bytes, encoding.block_bytes
    # In turns with what is read, memory gives a tenth more than if a whole unit is asked for first.
    asked = scale_bytes if ISA.asks else unit

    @entry(encoding.name, tokens, vectors)
    def integer_rows(
        address: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int, plus: int,
        scratch: int,
    ) -> None:  # fmt: skip
        w = memory(address, last * units * unit, np.uint8)
        packed = memory(x, tiles * units * 2 * BLOCK_BYTES * tokens, np.uint8)
        flat = memory(out, tiles * tokens * stride, np.float32)
        for tile in range(tiles):
            for group in range(first, last):
                for row in range(0, ROWS, rows):
                    sums = zeros(tokens, vectors, 1)
                    at = group * units * unit
                    x_at = tile * units * 2 * BLOCK_BYTES * tokens
                    for _ in range(units):
                        scales = at + 2 * row
                        block = at + scale_bytes + 4 * row
                        prefetch(w, at + AHEAD, asked)
                        sums = dot_block_int(sums, tokens, code, w, block, scales, packed, x_at)
                        x_at += BLOCK_BYTES * tokens
                        sums = dot_block_int(sums, tokens, code, w, block + half, scales + 32, packed, x_at)
                        x_at += BLOCK_BYTES * tokens
                        at += unit
                    if plus:
                        add(sums, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)
                    else:
                        store(sums, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)

    return integer_rows


def _bf16_rows(tokens: int) -> Any:
    """The same for bf16 weights and float32 activations."""
    vectors = ISA.tiles[tokens]
    rows = vectors * LANES
    columns = chains(tokens * vectors)

    @entry(tokens, vectors)
    def bf16_rows(
        address: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int, plus: int,
        scratch: int,
    ) -> None:  # fmt: skip
        cols = units * UNIT_COLS
        w = memory(address, last * ROWS * cols, np.uint16)
        packed = memory(x, tiles * cols * tokens, np.float32)
        flat = memory(out, tiles * tokens * stride, np.float32)
        for tile in range(tiles):
            for group in range(first, last):
                for row in range(0, ROWS, rows):
                    sums = zeros(tokens, vectors, columns)
                    at = group * cols * ROWS + row
                    x_at = tile * cols * tokens
                    for _ in range(cols // columns):
                        sums = multiply_bf16(sums, tokens, columns, w, at, ROWS, packed, x_at, tokens, 1)
                        at += columns * ROWS
                        x_at += columns * tokens
                    total = reduce_columns(sums, columns)
                    if plus:
                        add(total, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)
                    else:
                        store(total, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)

    return bf16_rows


def _rows(encoding: Encoding, tokens: int) -> Any:
    if not encoding.is_integer:
        return _bf16_rows(tokens)
    return amx_rows(encoding) if _MATRICES and tokens == ROWS else _integer_rows(encoding, tokens)


KERNELS = tuple({width: _rows(encoding, width) for width in WIDTHS} for encoding in ENCODINGS)
"""The kernel for each number of tokens a tile, by the code of the encoding.

They compute groups of 16 rows first to last - 1 of a matrix of so many units a group for `tiles` tiles of packed
activations x; out is float32 with `stride` items a token, added to if plus (0 or 1).  scratch: see `scratch_floats`.
"""


def matmul_kernels(encodings: Iterable[int]) -> NDArray[np.int64]:
    """Addresses of the kernels of some encodings, by code: (encodings, WIDEST + 1), [code, width]; the rest is 0."""
    addresses = np.zeros((len(ENCODINGS), WIDEST + 1), np.int64)
    for code in encodings:
        for width, kernel in KERNELS[code].items():
            addresses[code, width] = address_of(kernel)
    return addresses


@njit(nogil=True)
def unpacked(width: int) -> bool:
    """Whether the kernel for tiles of so many tokens unpacks a piece of weights into scratch."""
    return _MATRICES and width == ROWS


def scratch_floats(cols: int, multiple: int = 1) -> int:
    """float32 that a thread may need for a matrix of so many columns, `multiple` groups of rows at least at a time."""
    return unpacked_bytes(multiple * cols, CHUNK_BYTES) // 4 if _MATRICES else 0


def piece_floats(tokens: int, multiple: int) -> int:
    """float32 for the results of a piece as `take_rows` gives it to a thread that goes on with them."""
    return max(_PIECE, tokens * multiple * ROWS)


@njit(nogil=True)
def chunk_of(team: Any, matrix: Any, tokens: int, width: int) -> int:
    """How many groups of rows a thread takes at a time."""
    groups = matrix.rows // ROWS
    most = STREAM_BYTES if tokens <= width and not unpacked(width) else CHUNK_BYTES
    group = matrix.cols // UNIT_COLS * unit_bytes(matrix.encoding)
    return max(1, min(groups // (8 * acquire(team, MEMBERS)), most // group))


@njit(nogil=True)
def take_rows(team: Any, matrix: Any, tokens: int, width: int, multiple: int) -> Any:
    """The groups of rows that this thread computes next, and goes on with: (first, last), equal when none are left.

    first is a multiple of `multiple`, and so is last where it is not the end.  Of all tokens, rounded up to whole
    tiles, they make no more than `piece_floats` results.
    """
    groups = matrix.rows // ROWS
    chunk = min(chunk_of(team, matrix, tokens, width), _PIECE // (whole_tiles(tokens, width) * ROWS))
    chunk = max(multiple, chunk // multiple * multiple)
    first = min(claim(team, chunk), groups)
    return first, min(first + chunk, groups)


@njit(nogil=True)
def _run(
    kernels: Any, matrix: Any, x: Any, tokens: int, width: int, first: int, last: int, out_at: int, stride: int,
    plus: int, scratch: Any,
) -> None:  # fmt: skip
    """The kernel for a matrix and tiles of `width` tokens, on some groups of rows."""
    tiles = whole_tiles(tokens, width) // width
    run_at(
        kernels[matrix.encoding, width],
        (
            matrix.address, matrix.cols // UNIT_COLS, first, last, x.ctypes.data, tiles, out_at, stride, plus,
            scratch.ctypes.data,
        ),
    )  # fmt: skip


@njit(nogil=True)
def multiply_rows(
    kernels: Any, matrix: Any, x: Any, tokens: int, width: int, first: int, last: int, scratch: Any, out: Any
) -> None:
    """out[t, r] = sum over c of weight[ROWS * first + r, c] * x[t, c] for groups of rows, by this thread alone.

    out: float32, (tokens rounded up to a multiple of width) * ROWS * (last - first).
    """
    # Kernels count rows from the matrix's first.
    place = out.ctypes.data - out.itemsize * ROWS * first
    _run(kernels, matrix, x, tokens, width, first, last, place, ROWS * (last - first), 0, scratch)


@njit(nogil=True)
def matmul(
    team: Any, kernels: Any, matrix: Any, x: Any, tokens: int, width: int, out: Any, plus: int, scratch: Any
) -> None:
    """out[t, r] = sum over c of weight[r, c] * x[t, c], or += if plus (0 or 1), for t < tokens.

    kernels: see `matmul_kernels`.  matrix is a MATRIX record; x is packed (uint8, `width` tokens a tile); out is
    float32 (tokens rounded up to a multiple of width, at least matrix.rows).  scratch: this thread's float32
    (scratch_floats(matrix.cols),).  All members of the team call it, and share the rows.
    """
    groups = matrix.rows // ROWS
    chunk = chunk_of(team, matrix, tokens, width)
    while True:
        first = claim(team, chunk)
        if first >= groups:
            return
        last = min(first + chunk, groups)
        _run(kernels, matrix, x, tokens, width, first, last, out.ctypes.data, out.shape[1], plus, scratch)
