"""AMX products for attention of 16 rows of queries over int8 keys and values; bitwise equal to other kernels' sums.

Registers are those of npqwen/simd/amx.py. A block of keys, 16 positions by 32 coordinates, is multiplied like a block
of weights (`start_block`). For the values, registers 4 and 5 hold the weights of 64 positions, 6 and 7 the values of 16
coordinates.
"""

from __future__ import annotations

from llvmlite import ir

from npqwen.format.encodings import BLOCK_COLUMNS, UNIT_ROWS
from npqwen.simd.amx import SUM_BYTES, do
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import (
    CACHE_LINE,
    F32,
    I8,
    I32,
    I64,
    Array,
    Const,
    Int,
    Tile,
    element,
    fma,
    offset,
    operation,
    splat,
    step,
    vector,
)
from npqwen.simd.packed import scale_offset
from npqwen.simd.tile import LANES

_SUMS, _WEIGHTS, _VALUES = 0, 4, 6
"""The first register of each pair."""


@operation
def finish_scores(b: ir.IRBuilder, tile: Tile, n: Const, x: Array, x_at: Int, room: Array) -> Tile:
    """tile + the sums that `start_block` began in registers n, times the scales of the queries.

    tile: 16 vectors, one per row of queries. x[x_at:]: the queries of the block's columns (npqwen/simd/packed.py).
    room: uint8, 64-aligned, 2 * SUM_BYTES.
    """
    queries = element(b, x, x_at, I8)
    for t, products in enumerate(_sums(b, n, room)):
        x_scale = b.load(offset(b, queries, scale_offset(t, UNIT_ROWS), F32), align=4)
        tile[t] = fma(b, ISA.to_float(b, products), splat(b, x_scale, LANES), tile[t])
    return tile


@operation
def load_weights(b: ir.IRBuilder, weights: Array, stride: Const) -> None:
    """Load 16 rows of weights of 64 positions, uint8 from 0 to 127; a row is `stride` bytes after the previous one."""
    for n in range(2):
        place = element(b, weights, I64(BLOCK_COLUMNS * n), I8)
        do(b, "tileloadd64", I8(_WEIGHTS + n), place, I64(stride))


@operation
def start_values(b: ir.IRBuilder, n: Const, values: Array, at: Int, pitch: Int) -> None:
    """Multiply values of 16 coordinates by the loaded weights; n: 0 or 1, the register of the sums.

    values: uint8, a block of 16 coordinates by 32 positions at values[at:], that of the next 32 positions `pitch` bytes
    further.
    """
    do(b, "tilezero", I8(_SUMS + n))
    for block in range(2):
        place = element(b, values, step(b, at, block, pitch), I8)
        do(b, "tileloadd64", I8(_VALUES + block), place, I64(CACHE_LINE))
        do(b, "tdpbssd", I8(_SUMS + n), I8(_WEIGHTS + block), I8(_VALUES + block))


@operation
def finish_values(b: ir.IRBuilder, tile: Tile, n: Const, scales: Array, room: Array) -> Tile:
    """tile + the sums that `start_values` began in register n, times the rows' scales, float32.

    room is that of `finish_scores`.
    """
    for t, products in enumerate(_sums(b, n, room)):
        scale = b.load(element(b, scales, I64(t), F32), align=4)
        tile[t] = fma(b, b.sitofp(products, vector(F32, LANES)), splat(b, scale, LANES), tile[t])
    return tile


def _sums(b: ir.IRBuilder, n: int, room: ir.Value) -> list[ir.Value]:
    """The sums in register n, by way of memory: 16 vectors of int32."""
    place = offset(b, room, n * SUM_BYTES, I8)
    do(b, "tilestored64", I8(_SUMS + n), place, I64(CACHE_LINE))
    kind = vector(I32, LANES)
    return [b.load(offset(b, place, CACHE_LINE * t, kind), align=CACHE_LINE) for t in range(UNIT_ROWS)]
