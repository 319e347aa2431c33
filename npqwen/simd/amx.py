"""AMX: registers that hold 16 rows of 64 bytes, and an instruction that multiplies two of them (Intel, since 2023).

Registers 0 and 1 hold sums, 16 tokens by 16 rows of weights. 4 and 5 hold the activations of a block of 32 columns, 16
tokens by 32 int8; 6 and 7 its weights, 8 quads of 4 columns by 16 rows, as in the file format. Two of each, so that a
block is multiplied while the sums of the previous one are scaled.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npqwen.format.encodings import BLOCK_COLUMNS, ENCODINGS, UNIT_ROWS
from npqwen.simd.instructions import QUADS
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import (
    CACHE_LINE,
    F32,
    I8,
    I32,
    I64,
    VOID,
    Array,
    Const,
    Int,
    Tile,
    call,
    constant,
    element,
    fma,
    offset,
    operation,
    splat,
    vector,
)
from npqwen.simd.packed import scale_offset
from npqwen.simd.tile import LANES, bytes_

SUM_BYTES = UNIT_ROWS * CACHE_LINE
"""Bytes of a register of sums."""
UNPACKED_BLOCK = UNIT_ROWS * BLOCK_COLUMNS
"""Bytes of a block as int8."""
_SUMS, _ACTIVATIONS, _WEIGHTS = 0, 4, 6
"""The first register of each pair."""


@operation
def configure(b: ir.IRBuilder) -> None:
    """Give this thread's registers their shapes; called before any other, with `release` at the end."""
    rows = [16, 16, 0, 0, 16, 16, QUADS, QUADS]
    shape(b, rows, [CACHE_LINE, CACHE_LINE, 0, 0, BLOCK_COLUMNS, BLOCK_COLUMNS, CACHE_LINE, CACHE_LINE])


def shape(b: ir.IRBuilder, rows: list[int], widths: list[int]) -> None:
    """Give the eight registers their numbers of rows, and of bytes in a row."""
    widths_as_bytes = [byte for width in widths for byte in (width, 0)]
    # Palette 1; bytes per row from byte 16; rows from byte 48.
    values = [1, *[0] * 15, *widths_as_bytes, *[0] * 16, *rows, *[0] * 8]
    shapes = cgutils.global_constant(b, "npqwen_amx_shapes", ir.Constant(ir.ArrayType(I8, 64), values))
    do(b, "ldtilecfg", b.bitcast(shapes, I8.as_pointer()))


@operation
def release(b: ir.IRBuilder) -> None:
    """Clear the registers' shapes: the system then no longer has to save the registers."""
    do(b, "tilerelease")


@operation(returns=lambda encoding, codebook: types.UniTuple(bytes_, 1))
def load_signed_codebook(b: ir.IRBuilder, encoding: Const, codebook: Array) -> Tile:
    """A matrix's codebook without the zero point, for `unpack_signed`. Not read if the encoding has none."""
    table = ISA.codebook(b, ENCODINGS[encoding], codebook)
    return [b.sub(table, constant(I8, table.type.count, ENCODINGS[encoding].zero_point))]


@operation
def unpack_signed(
    b: ir.IRBuilder, encoding: Const, codebook: Tile, w: Array, at: Int, out: Array, out_at: Int
) -> None:
    """out[out_at:] = the values of the block of weights at uint8 w[at:], int8: 512 bytes in quads.

    encoding: a code. codebook: from `load_signed_codebook`.
    """
    block, place = element(b, w, at, I8), element(b, out, out_at, I8)
    zero_point = 0 if ENCODINGS[encoding].codebook else ENCODINGS[encoding].zero_point
    for n, (quad,) in ISA.quads(b, ENCODINGS[encoding], codebook[0], [block]):
        values = b.sub(quad, constant(I8, CACHE_LINE, zero_point))
        b.store(values, offset(b, place, CACHE_LINE * n, quad.type), align=CACHE_LINE)


@operation
def start_block(b: ir.IRBuilder, n: Const, w: Array, at: Int, x: Array, x_at: Int) -> None:
    """Multiply a block of int8 weights, uint8 w[at:], by 16 tokens' activations x[x_at:]; n: 0 or 1, the registers."""
    weights, activations = element(b, w, at, I8), element(b, x, x_at, I8)
    do(b, "tilezero", I8(_SUMS + n))
    do(b, "tileloadd64", I8(_ACTIVATIONS + n), activations, I64(BLOCK_COLUMNS))
    do(b, "tileloadd64", I8(_WEIGHTS + n), weights, I64(CACHE_LINE))
    do(b, "tdpbssd", I8(_SUMS + n), I8(_ACTIVATIONS + n), I8(_WEIGHTS + n))


@operation
def finish_block(
    b: ir.IRBuilder, tile: Tile, n: Const, w: Array, scales_at: Int, x: Array, x_at: Int, room: Array
) -> Tile:
    """tile + the sums that `start_block` began, times the scales of weights and activations.

    tile: 16 vectors, one per token. w[scales_at:]: the block's int8 scales. x[x_at:]: its activations
    (npqwen/simd/packed.py). room: uint8, 64-aligned, 2 * SUM_BYTES.
    """
    activations = element(b, x, x_at, I8)
    sums = offset(b, room, n * SUM_BYTES, I8)
    do(b, "tilestored64", I8(_SUMS + n), sums, I64(CACHE_LINE))
    scale = ISA.block_scales(b, element(b, w, scales_at, I8))
    for t in range(UNIT_ROWS):
        x_scale = b.load(offset(b, activations, scale_offset(t, UNIT_ROWS), F32), align=4)
        products = b.load(offset(b, sums, CACHE_LINE * t, vector(I32, LANES)), align=CACHE_LINE)
        # In the order of `dot_block_int`: bitwise equal.
        scaled = b.fmul(ISA.to_float(b, products), scale)
        tile[t] = fma(b, scaled, splat(b, x_scale, LANES), tile[t])
    return tile


def do(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    """Emit an AMX instruction by its LLVM name."""
    call(b, f"llvm.x86.{name}", VOID, *args)
