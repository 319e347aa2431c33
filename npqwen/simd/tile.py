"""Register tiles: accumulators in SIMD registers as one Numba value, and the operations that kernels do on them.

A tile is a tuple of `tokens * rows` float32 vectors; vector `t * rows + r` holds, one a lane, the sums of token t and
of weight rows `r * LANES` and up. Kernels that keep several sums for each, to hide the latency of multiply-adds, have
one such tile for each of `columns` neighbouring columns, one after the other. Operations unroll when they are compiled:
a kernel is an ordinary loop around a few calls, and LLVM keeps the whole tile in registers. Offsets into arrays count
elements.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from npqwen.format.encodings import ENCODINGS
from npqwen.simd.instructions import PREFETCH_DISTANCE
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import (
    CACHE_LINE,
    F32,
    I8,
    I16,
    I32,
    Array,
    Const,
    Int,
    Tile,
    constant,
    element,
    fma,
    offset,
    operation,
    prefetch_line,
    splat,
    step,
    vector,
)
from npqwen.simd.packed import scale_offset

LANES = ISA.lanes
"""float32 of a vector."""
FLOATS = vector(F32, LANES)


class Vector(types.Type):
    """`LANES` float32 in a register."""

    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """Passed on and held as an LLVM vector."""

    def __init__(self, manager: Any, numba_type: Vector) -> None:
        super().__init__(manager, numba_type, FLOATS)


f32s = Vector()


def chains(vectors: int) -> int:
    """Independent sums of each of so many accumulators that keep the processor busy: 4, 2 or 1."""
    return max(1, min(4, ISA.accumulators // vectors))


@operation(returns=lambda tokens, rows, columns: types.UniTuple(f32s, tokens * rows * columns))
def zeros(b: ir.IRBuilder, tokens: Const, rows: Const, columns: Const) -> Tile:
    """Tiles of zeros for `columns` columns, `rows` vectors of rows a token."""
    return [constant(F32, LANES, 0.0)] * (tokens * rows * columns)


@operation
def store(b: ir.IRBuilder, tile: Tile, out: Array, at: Int, rows: Const, stride: Int) -> None:
    """out[at + t * stride + r * LANES:] = the tile's vector of token t and rows r; out: float32."""
    for n, value in enumerate(tile):
        b.store(value, _place(b, out, at, n, rows, stride), align=4)


@operation
def store_add(b: ir.IRBuilder, tile: Tile, out: Array, at: Int, rows: Const, stride: Int) -> None:
    """out[at + t * stride + r * LANES:] += the tile's vector of token t and rows r; out: float32."""
    for n, value in enumerate(tile):
        place = _place(b, out, at, n, rows, stride)
        b.store(b.fadd(b.load(place, align=4), value), place, align=4)


@operation
def store_columns(
    b: ir.IRBuilder, tile: Tile, columns: Const, out: Array, at: Int, pitch: Int, rows: Const, stride: Int
) -> None:
    """`store` the tile of each of `columns` columns, `pitch` after that of the column before."""
    size = len(tile) // columns
    for n, value in enumerate(tile):
        column = step(b, at, n // size, pitch)
        b.store(value, _place(b, out, column, n % size, rows, stride), align=4)


def _place(b: ir.IRBuilder, out: ir.Value, at: ir.Value, n: int, rows: int, stride: ir.Value) -> ir.Value:
    """Where the n-th vector of a tile belongs."""
    t, r = divmod(n, rows)
    return element(b, out, step(b, step(b, at, t, stride), r * LANES), FLOATS)


@operation(returns=lambda tile, columns: types.UniTuple(f32s, tile.count // columns))
def reduce_columns(b: ir.IRBuilder, tile: Tile, columns: Const) -> Tile:
    """The sum of the tiles of `columns` columns, one tile."""
    size = len(tile) // columns
    sums = tile[:size]
    for n, value in enumerate(tile[size:]):
        sums[n % size] = b.fadd(sums[n % size], value)
    return sums


@operation
def dot_block_int(
    b: ir.IRBuilder, tile: Tile, tokens: Const, encoding: Const, w: Array, at: Int, scales_at: Int, x: Array, x_at: Int
) -> Tile:
    """tile + a block of weights @ the tokens' activations.

    encoding: the code of an integer encoding. w: uint8, the block's weights at w[at:], their float16 scales at
    w[scales_at:], both of the tile's first row. x: uint8, the block's activations at x[x_at:] (npqwen/simd/packed.py).
    """
    block, scales, activations = element(b, w, at, I8), element(b, w, scales_at, I8), element(b, x, x_at, I8)
    rows = len(tile) // tokens
    for r in range(rows):
        products = ISA.products(b, ENCODINGS[encoding], offset(b, block, 4 * LANES * r, I8), activations, tokens)
        scale = ISA.from_half(b, b.load(offset(b, scales, 2 * LANES * r, vector(I16, LANES)), align=2))
        for t, sums in enumerate(products):
            x_scale = b.load(offset(b, activations, scale_offset(t, tokens), F32), align=4)
            # Not the scales first: LLVM would make that product early, and have no register for it.
            scaled = b.fmul(ISA.to_float(b, sums), splat(b, x_scale, LANES))
            n = t * rows + r
            tile[n] = fma(b, scaled, scale, tile[n])
    return tile


BFLOAT16, FLOAT16, FLOAT32 = range(3)
"""Dtypes of columns of floats; arrays hold the first two as uint16."""


@operation
def multiply_add_columns(
    b: ir.IRBuilder, tile: Tile, tokens: Const, columns: Const, dtype: Const,
    w: Array, at: Int, pitch: Int, x: Array, x_at: Int, x_pitch: Int, stride: Int,
) -> Tile:  # fmt: skip
    """Add the outer product of each of `columns` columns with the tokens' activations to the tile of the column.

    Column c is w[at + c * pitch:], a row each, of the dtype BFLOAT16, FLOAT16 or FLOAT32; its activation for token t is
    x[x_at + c * x_pitch + t * stride], float32. `reduce_columns` adds the tiles up.
    """
    rows = len(tile) // (tokens * columns)
    for c in range(columns):
        column = element(b, w, step(b, at, c, pitch), I8)
        first = step(b, x_at, c, x_pitch)
        values = [b.load(element(b, x, step(b, first, t, stride), F32), align=4) for t in range(tokens)]
        values = [splat(b, value, LANES) for value in values]
        for r in range(rows):
            weights = _load(b, dtype, column, r)
            for t in range(tokens):
                n = (c * tokens + t) * rows + r
                tile[n] = fma(b, values[t], weights, tile[n])
    return tile


def _load(b: ir.IRBuilder, dtype: int, column: ir.Value, r: int) -> ir.Value:
    """The r-th `LANES` rows of a column, as float32."""
    if dtype == FLOAT32:
        return b.load(offset(b, column, 4 * LANES * r, FLOATS), align=4)
    halves = b.load(offset(b, column, 2 * LANES * r, vector(I16, LANES)), align=2)
    if dtype == FLOAT16:
        return ISA.from_half(b, halves)
    return b.bitcast(b.shl(b.zext(halves, vector(I32, LANES)), constant(I32, LANES, 16)), FLOATS)


@operation
def prefetch(b: ir.IRBuilder, array: Array, at: Int, size: Const) -> None:
    """Prefetch `size` bytes from array[at] on; they need not be mapped."""
    place = element(b, array, at, I8)
    for line in range(0, size, CACHE_LINE):
        prefetch_line(b, offset(b, place, line, I8))


@operation
def add_stream(b: ir.IRBuilder, tile: Tile, array: Array, at: Int, count: Const) -> Tile:
    """tile + the `count` float32 array[at:], a vector to each of the tile's in turn; reads ahead by prefetching."""
    for n in range(count // LANES):
        place = element(b, array, step(b, at, n * LANES), FLOATS)
        if n * LANES * 4 % CACHE_LINE == 0:
            prefetch_line(b, offset(b, place, PREFETCH_DISTANCE, I8))
        tile[n % len(tile)] = b.fadd(tile[n % len(tile)], b.load(place, align=4))
    return tile


ROWS = 16
