"""AMX: registers that hold 16 rows of 64 bytes, and an instruction that multiplies two of them (Intel, since 2023).

Registers 0 and 1 hold sums, 16 tokens by 16 rows of weights.  4 and 5 hold the activations of a block of 32
columns, 16 tokens by 32 int8; 6 and 7 its weights, 8 quads of 4 columns by 16 rows, as the format has them.
Two of each, so that a block is multiplied while the sums of the one before are scaled.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npqwen.format.encodings import ENCODINGS
from npqwen.simd.instructions import CACHE_LINE, F32, I8, I16, I32, address, constant, splat, vector
from npqwen.simd.isa import ISA
from npqwen.simd.tile import LANES, ROWS, multiply_add, pointer

I64 = ir.IntType(64)
SUM_BYTES = 1024
"""Of a register of sums."""
UNPACKED_BLOCK = 512
"""Bytes of 16 rows by 32 columns as int8."""
_X_BYTES = 32
"""Of a token's activations of a block."""


def _do(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), args)


@intrinsic
def configure(_: Any) -> Any:
    """Tell this thread's registers their shapes; to be called before any other, and `release` at the end."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        rows = [16, 16, 0, 0, 16, 16, 8, 8]
        widths = [CACHE_LINE, CACHE_LINE, 0, 0, _X_BYTES, _X_BYTES, CACHE_LINE, CACHE_LINE]
        widths_as_bytes = [byte for width in widths for byte in (width, 0)]
        # Palette 1; bytes a row from byte 16; rows from byte 48.
        values = [1, *[0] * 15, *widths_as_bytes, *[0] * 16, *rows, *[0] * 8]
        shapes = cgutils.global_constant(b, "npqwen_amx_shapes", ir.Constant(ir.ArrayType(I8, 64), values))
        _do(b, "ldtilecfg", b.bitcast(shapes, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def release(_: Any) -> Any:
    """Give the registers back: the system need not save them any more."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        _do(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def unpack_block(_: Any, encoding: Any, w: Any, at: Any, out: Any, out_at: Any) -> Any:
    """out[out_at:] = the block at uint8 w[at:] as int8: 512 bytes in quads; encoding: a constant, its code."""
    sig = types.void(encoding, w, types.int64, out, types.int64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        encoding = ENCODINGS[sig.args[0].literal_value]
        block = pointer(context, b, sig.args[1], args[1], args[2], I8)
        place = pointer(context, b, sig.args[3], args[3], args[4], I8)
        kind = vector(I8, CACHE_LINE)
        zero_point = constant(I8, CACHE_LINE, encoding.zero_point)
        for n, quad in ISA.quads(b, encoding, block):
            b.store(b.sub(quad, zero_point), address(b, place, CACHE_LINE * n, kind), align=CACHE_LINE)
        return context.get_dummy_value()

    return sig, generate


@intrinsic(prefer_literal=True)
def start_block(_: Any, n: Any, w: Any, at: Any, x: Any, x_at: Any) -> Any:
    """Multiply a block of int8 weights, uint8 w[at:], by 16 tokens' activations x[x_at:]; n: 0 or 1, a constant."""
    sig = types.void(n, w, types.int64, x, types.int64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        n = sig.args[0].literal_value
        weights = pointer(context, b, sig.args[1], args[1], args[2], I8)
        activations = pointer(context, b, sig.args[3], args[3], args[4], I8)
        _do(b, "tilezero", I8(n))
        _do(b, "tileloadd64", I8(4 + n), activations, I64(_X_BYTES))
        _do(b, "tileloadd64", I8(6 + n), weights, I64(CACHE_LINE))
        _do(b, "tdpbssd", I8(n), I8(4 + n), I8(6 + n))
        return context.get_dummy_value()

    return sig, generate


@intrinsic(prefer_literal=True)
def finish_block(_: Any, tile: Any, n: Any, w: Any, scales_at: Any, x: Any, x_at: Any, room: Any) -> Any:
    """tile + the sums that `start_block` began, times the scales of weights and activations.

    tile: 16 vectors, one a token.  w[scales_at:]: the block's f16 scales.  x[x_at:]: its activations, whose scales
    follow them.  room: uint8, 64-aligned, 2 * SUM_BYTES.
    """

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        n = sig.args[1].literal_value
        tile = cgutils.unpack_tuple(b, args[0])
        halves = pointer(context, b, sig.args[2], args[2], args[3], vector(I16, LANES))
        activations = pointer(context, b, sig.args[4], args[4], args[5], I8)
        sums = pointer(context, b, sig.args[6], args[6], I64(n * SUM_BYTES), I8)
        _do(b, "tilestored64", I8(n), sums, I64(CACHE_LINE))
        scale = ISA.from_half(b, b.load(halves, align=2))
        for t in range(ROWS):
            x_scale = b.load(address(b, activations, _X_BYTES * ROWS + 4 * t, F32), align=4)
            products = b.load(address(b, sums, CACHE_LINE * t, vector(I32, LANES)), align=CACHE_LINE)
            # In the order of tile.py's `dot_block_int`: the same to the bit.
            scaled = b.fmul(ISA.to_float(b, products), splat(b, x_scale, LANES))
            tile[t] = multiply_add(b, scaled, scale, tile[t])
        return cgutils.pack_array(b, tile)

    i64 = types.int64
    return tile(tile, n, w, i64, x, i64, room), generate
