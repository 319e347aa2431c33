"""out = weight @ x for every encoding of the format: the kernels that do nearly all of the work.

A thread takes some groups of 16 rows at a time and multiplies each, a tile of tokens after the other, while the
sums stay in registers.  With one token that reads every weight once, at the memory's speed; with many,
each weight is unpacked once a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.kernels.packing import BLOCK_BYTES, WIDTHS
from npqwen.kernels.variant import variant
from npqwen.simd.isa import ISA
from npqwen.simd.scalar import bits_float, memory, unhalf
from npqwen.simd.tile import (
    LANES,
    ROWS,
    add,
    chains,
    fold,
    multiply_bf16,
    multiply_int4,
    multiply_int8,
    prefetch,
    store,
    zeros,
)
from npqwen.team import MEMBERS, acquire, take

MATRIX = np.dtype([("address", np.int64), ("bits", np.int64), ("rows", np.int64), ("cols", np.int64)])
"""A mapped matrix: where its units lie, its encoding (4, 8 or 16 bits), its padded size."""
UNIT_COLS = 64
UNIT_BYTES = {4: 576, 8: 1088, 16: 2048}
_UNIT4, _UNIT8, _UNIT16 = UNIT_BYTES[4], UNIT_BYTES[8], UNIT_BYTES[16]
CHUNK_BYTES = 1 << 17
STREAMED = 4
"""Tokens up to which memory is the limit, so that weights are worth asking for early."""


def _int4_rows(tokens: int) -> Any:
    """The kernel for int4 weights and tiles of `tokens` tokens."""
    vectors = ISA.tiles[tokens]
    rows = vectors * LANES
    streamed = tokens <= STREAMED

    @variant(tokens, vectors)
    def int4_rows(w: Any, units: int, first: int, last: int, x: Any, tiles: int, out: Any, plus: int) -> None:
        stride = out.shape[1]
        flat = out.reshape(-1)
        for tile in range(tiles):
            for group in range(first, last):
                for row in range(0, ROWS, rows):
                    sums = zeros(tokens, vectors, 1)
                    at = group * units * _UNIT4
                    x_at = tile * units * 2 * BLOCK_BYTES * tokens
                    for _ in range(units):
                        scales = at + 2 * row
                        block = at + 64 + 4 * row
                        if streamed:
                            prefetch(w, at, _UNIT4)
                        sums = multiply_int4(sums, tokens, w, block, scales, x, x_at)
                        x_at += BLOCK_BYTES * tokens
                        sums = multiply_int4(sums, tokens, w, block + 256, scales + 32, x, x_at)
                        x_at += BLOCK_BYTES * tokens
                        at += _UNIT4
                    if plus:
                        add(sums, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)
                    else:
                        store(sums, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)

    return int4_rows


def _int8_rows(tokens: int) -> Any:
    """The same for int8 weights."""
    vectors = ISA.tiles[tokens]
    rows = vectors * LANES
    streamed = tokens <= STREAMED

    @variant(tokens, vectors)
    def int8_rows(w: Any, units: int, first: int, last: int, x: Any, tiles: int, out: Any, plus: int) -> None:
        stride = out.shape[1]
        flat = out.reshape(-1)
        for tile in range(tiles):
            for group in range(first, last):
                for row in range(0, ROWS, rows):
                    sums = zeros(tokens, vectors, 1)
                    at = group * units * _UNIT8
                    x_at = tile * units * 2 * BLOCK_BYTES * tokens
                    for _ in range(units):
                        scales = at + 2 * row
                        block = at + 64 + 4 * row
                        if streamed:
                            prefetch(w, at, _UNIT8)
                        sums = multiply_int8(sums, tokens, w, block, scales, x, x_at)
                        x_at += BLOCK_BYTES * tokens
                        sums = multiply_int8(sums, tokens, w, block + 512, scales + 32, x, x_at)
                        x_at += BLOCK_BYTES * tokens
                        at += _UNIT8
                    if plus:
                        add(sums, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)
                    else:
                        store(sums, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)

    return int8_rows


def _bf16_rows(tokens: int) -> Any:
    """The same for bf16 weights and float32 activations."""
    vectors = ISA.tiles[tokens]
    rows = vectors * LANES
    columns = chains(tokens * vectors)

    @variant(tokens, vectors)
    def bf16_rows(w: Any, units: int, first: int, last: int, x: Any, tiles: int, out: Any, plus: int) -> None:
        stride = out.shape[1]
        flat = out.reshape(-1)
        halves, floats = w.view(np.uint16), x.view(np.float32)
        cols = units * UNIT_COLS
        for tile in range(tiles):
            for group in range(first, last):
                for row in range(0, ROWS, rows):
                    sums = zeros(tokens, vectors, columns)
                    at = group * cols * ROWS + row
                    x_at = tile * cols * tokens
                    for _ in range(cols // columns):
                        sums = multiply_bf16(sums, tokens, columns, halves, at, ROWS, floats, x_at, tokens, 1)
                        at += columns * ROWS
                        x_at += columns * tokens
                    total = fold(sums, columns)
                    if plus:
                        add(total, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)
                    else:
                        store(total, flat, tile * tokens * stride + group * ROWS + row, vectors, stride)

    return bf16_rows


def of_any_width(kernel_of: Any, widths: tuple[int, ...]) -> Any:
    """One function that calls the kernel made for the width it is given, of at most four.

    All in one step: LLVM goes over everything again at each function around it.
    """
    kernels = [kernel_of(width) for width in widths]
    # The last stands in for those that are not there.
    width_0, width_1, width_2 = (widths + widths[-1:] * 2)[:3]
    kernel_0, kernel_1, kernel_2, kernel_3 = (kernels + kernels[-1:] * 3)[:4]

    @variant(kernel_of.__name__, *widths)
    def rows(width: int, *args: Any) -> None:
        if width == width_0:
            kernel_0(*args)
        elif width == width_1:
            kernel_1(*args)
        elif width == width_2:
            kernel_2(*args)
        else:
            kernel_3(*args)

    return rows


_int4 = of_any_width(_int4_rows, WIDTHS)
_int8 = of_any_width(_int8_rows, WIDTHS)
_bf16 = of_any_width(_bf16_rows, WIDTHS)


@njit(nogil=True)
def unit_bytes(bits: int) -> int:
    """Bytes of a unit of an encoding."""
    return _UNIT4 if bits == 4 else (_UNIT8 if bits == 8 else _UNIT16)


@njit(nogil=True, inline="always")
def matmul_rows(
    bits: int, width: int, w: Any, units: int, first: int, last: int, x: Any, tiles: int, out: Any, plus: int
) -> None:
    """The product for groups of 16 rows first to last - 1 of a matrix, `tiles` tiles of `width` tokens."""
    if bits == 4:
        _int4(width, w, units, first, last, x, tiles, out, plus)
    elif bits == 8:
        _int8(width, w, units, first, last, x, tiles, out, plus)
    else:
        _bf16(width, w, units, first, last, x, tiles, out, plus)


@njit(nogil=True)
def matmul(team: Any, matrix: Any, x: Any, tokens: int, width: int, out: Any, plus: int) -> None:
    """out[t, r] = sum over c of weight[r, c] * x[t, c], or += if plus (0 or 1), for t < tokens.

    matrix is a MATRIX record; x is packed (uint8, `width` tokens a tile); out is float32 (tokens rounded up to a
    multiple of width, at least matrix.rows).  All members of the team call it, and share the rows.
    """
    units = matrix.cols // UNIT_COLS
    unit = unit_bytes(matrix.bits)
    groups = matrix.rows // ROWS
    w = memory(matrix.address, groups * units * unit, np.uint8)
    tiles = (tokens + width - 1) // width
    chunk = max(1, min(groups // (8 * acquire(team, MEMBERS)), CHUNK_BYTES // (units * unit)))
    while True:
        first = take(team, chunk)
        if first >= groups:
            return
        matmul_rows(matrix.bits, width, w, units, first, min(first + chunk, groups), x, tiles, out, plus)


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
