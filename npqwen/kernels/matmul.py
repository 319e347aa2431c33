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

from npqwen.compiled import address_of
from npqwen.kernels.entry import entry, run_at
from npqwen.kernels.packing import BLOCK_BYTES, WIDEST, WIDTHS
from npqwen.simd.isa import ISA
from npqwen.simd.scalar import bits_float, memory, unhalf
from npqwen.simd.tile import (
    LANES,
    ROWS,
    add,
    chains,
    fold,
    multiply_bf16,
    multiply_integers,
    prefetch,
    store,
    zeros,
)
from npqwen.team import MEMBERS, acquire, take

MATRIX = np.dtype([("address", np.int64), ("bits", np.int64), ("rows", np.int64), ("cols", np.int64)])
"""A mapped matrix: where its units lie, its encoding (4, 8 or 16 bits), its padded size."""
UNIT_COLS = 64
SCALE_BYTES = 64
"""Before an int4 or int8 unit's weights: two float16 for each of its rows."""
UNIT_BYTES = {4: 576, 8: 1088, 16: 2048}
_UNIT4, _UNIT8, _UNIT16 = UNIT_BYTES[4], UNIT_BYTES[8], UNIT_BYTES[16]
CHUNK_BYTES = 1 << 17
"""Of weights that a thread takes at a time: they stay in its cache for all tiles of tokens."""
STREAM_BYTES = 1 << 19
"""The same for one tile, which reads them once: where a thread begins anew, memory has to be waited for."""


def _integer_rows(bits: int, tokens: int) -> Any:
    """The kernel for int4 or int8 weights and tiles of `tokens` tokens."""
    vectors = ISA.tiles[tokens]
    rows = vectors * LANES
    unit = UNIT_BYTES[bits]
    half = (unit - SCALE_BYTES) // 2

    @entry(bits, tokens, vectors)
    def integer_rows(
        address: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int, plus: int
    ) -> None:
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
                        block = at + SCALE_BYTES + 4 * row
                        prefetch(w, at, unit)
                        sums = multiply_integers(sums, tokens, bits, w, block, scales, packed, x_at)
                        x_at += BLOCK_BYTES * tokens
                        sums = multiply_integers(sums, tokens, bits, w, block + half, scales + 32, packed, x_at)
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
        address: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int, plus: int
    ) -> None:
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
                    total = fold(sums, columns)
                    if plus:
                        add(total, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)
                    else:
                        store(total, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)

    return bf16_rows


KERNELS = {
    4: {width: _integer_rows(4, width) for width in WIDTHS},
    8: {width: _integer_rows(8, width) for width in WIDTHS},
    16: {width: _bf16_rows(width) for width in WIDTHS},
}
"""The kernel for each encoding and number of tokens a tile.

They compute groups of 16 rows first to last - 1 of a matrix of so many units a group for `tiles` tiles of packed
activations x; out is float32 with `stride` items a token, added to if plus (0 or 1).
"""


def matmul_kernels(encodings: Iterable[int]) -> NDArray[np.int64]:
    """Where the machine code of some encodings' kernels is: (3, WIDEST + 1), [bits // 8, width]; the rest is 0."""
    addresses = np.zeros((3, WIDEST + 1), np.int64)
    for bits in encodings:
        for width, kernel in KERNELS[bits].items():
            addresses[bits // 8, width] = address_of(kernel)
    return addresses


@njit(nogil=True)
def unit_bytes(bits: int) -> int:
    """Bytes of a unit of an encoding."""
    return _UNIT4 if bits == 4 else (_UNIT8 if bits == 8 else _UNIT16)


@njit(nogil=True)
def matmul(team: Any, kernels: Any, matrix: Any, x: Any, tokens: int, width: int, out: Any, plus: int) -> None:
    """out[t, r] = sum over c of weight[r, c] * x[t, c], or += if plus (0 or 1), for t < tokens.

    kernels: see `matmul_kernels`.  matrix is a MATRIX record; x is packed (uint8, `width` tokens a tile); out is
    float32 (tokens rounded up to a multiple of width, at least matrix.rows).  All members of the team call it,
    and share the rows.
    """
    units = matrix.cols // UNIT_COLS
    groups = matrix.rows // ROWS
    tiles = (tokens + width - 1) // width
    most = CHUNK_BYTES if tiles > 1 else STREAM_BYTES
    chunk = max(1, min(groups // (8 * acquire(team, MEMBERS)), most // (units * unit_bytes(matrix.bits))))
    kernel = kernels[matrix.bits // 8, width]
    x_at, out_at, stride = x.ctypes.data, out.ctypes.data, out.shape[1]
    while True:
        first = take(team, chunk)
        if first >= groups:
            return
        last = min(first + chunk, groups)
        run_at(kernel, (matrix.address, units, first, last, x_at, tiles, out_at, stride, plus))


@njit(nogil=True)
def read_row(matrix: Any, row: int, out: Any) -> None:
    """Row `row` of a MATRIX as float32: out (cols,).  An embedding's look-up."""
    units = matrix.cols // UNIT_COLS
    group, r = row // ROWS, row % ROWS
    unit = unit_bytes(matrix.bits)
    w = memory(matrix.address + group * units * unit, units * unit, np.uint8)
    for u in range(units):
        if matrix.bits == 16:
            _read_bf16(w[u * unit : (u + 1) * unit], r, out[u * UNIT_COLS : (u + 1) * UNIT_COLS])
        else:
            _read_integers(
                w[u * unit : (u + 1) * unit], matrix.bits, r, out[u * UNIT_COLS : (u + 1) * UNIT_COLS]
            )


@njit(nogil=True)
def _read_bf16(unit: Any, r: int, out: Any) -> None:
    halves = unit.view(np.uint16)
    for c in range(UNIT_COLS):
        out[c] = bits_float(np.int32(halves[c * ROWS + r]) << np.int32(16))


@njit(nogil=True)
def _read_integers(unit: Any, bits: int, r: int, out: Any) -> None:
    scales = unit.view(np.uint16)
    for c in range(UNIT_COLS):
        block, quad, k = c // 32, c % 32 // 4, c % 4
        scale = unhalf(scales[ROWS * block + r])
        if bits == 4:
            pair = np.int32(unit[64 + 256 * block + 64 * (quad % 4) + 4 * r + k])
            q = (pair & np.int32(15) if quad < 4 else pair >> np.int32(4)) - np.int32(8)
        else:
            q = np.int32(np.int8(unit[64 + 512 * block + 64 * quad + 4 * r + k]))
        out[c] = np.float32(q) * scale
