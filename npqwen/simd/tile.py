"""Tiles: accumulators in SIMD registers as one Numba value, and the operations that kernels do on them.

A tile is a tuple of `tokens * rows` float32 vectors; vector `t * rows + r` holds, one a lane, the sums of token t
and of weight rows `r * LANES` and up.  The operations unroll when they are compiled, so that a kernel
is an ordinary loop around a few calls and LLVM keeps the whole tile in registers.  Offsets count elements of
the array they go with.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from npqwen.simd.instructions import F32, I8, I16, I32, address, call, constant, splat, vector
from npqwen.simd.isa import ISA

LANES = ISA.lanes
FLOATS = vector(F32, LANES)
ROWS = 16
"""Rows of weights in a unit of the format, whatever the width of a vector."""


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


def _pointer(context: Any, b: ir.IRBuilder, kind: Any, array: Any, at: Any, to: ir.Type) -> ir.Value:
    data = context.make_array(kind)(context, b, array).data
    return b.bitcast(b.gep(data, [at]), to.as_pointer())


def _multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return call(b, f"llvm.fma.v{LANES}f32", FLOATS, x, y, z)


@intrinsic(prefer_literal=True)
def zeros(_: Any, tokens: Any, rows: Any) -> Any:
    """A tile of zeros; tokens and rows are constants."""
    kind = types.UniTuple(f32s, tokens.literal_value * rows.literal_value)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return cgutils.pack_array(b, [constant(F32, LANES, 0.0)] * sig.return_type.count)

    return kind(tokens, rows), generate


def _spread(context: Any, b: ir.IRBuilder, sig: Any, args: Any, plus: bool) -> Any:
    """Write or add a tile's vectors to out[at + t * stride + r * LANES:]."""
    tile, out, at, rows, stride = args
    rows = sig.args[3].literal_value
    for n, value in enumerate(cgutils.unpack_tuple(b, tile)):
        t, r = divmod(n, rows)
        place = b.add(at, b.add(b.mul(stride, stride.type(t)), stride.type(r * LANES)))
        where = _pointer(context, b, sig.args[1], out, place, FLOATS)
        b.store(b.fadd(b.load(where, align=4), value) if plus else value, where, align=4)
    return context.get_dummy_value()


@intrinsic(prefer_literal=True)
def store(_: Any, tile: Any, out: Any, at: Any, rows: Any, stride: Any) -> Any:
    """Write a tile to float32 out[at + t * stride + r * LANES:]; rows (vectors a token) is a constant."""
    sig = types.void(tile, out, types.int64, rows, types.int64)
    return sig, lambda context, b, sig, args: _spread(context, b, sig, args, plus=False)


@intrinsic(prefer_literal=True)
def add(_: Any, tile: Any, out: Any, at: Any, rows: Any, stride: Any) -> Any:
    """Add a tile to what stands there."""
    sig = types.void(tile, out, types.int64, rows, types.int64)
    return sig, lambda context, b, sig, args: _spread(context, b, sig, args, plus=True)


def _quantized(quads_of: Any, dot: Any) -> Any:
    """The step of a product for one block of 32 columns of an integer encoding."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        tile, tokens, w, at, scales_at, x, x_at = args
        tokens = sig.args[1].literal_value
        tile = cgutils.unpack_tuple(b, tile)
        rows = len(tile) // tokens
        block = _pointer(context, b, sig.args[2], w, at, I8)
        scales = _pointer(context, b, sig.args[2], w, scales_at, I8)
        xs = _pointer(context, b, sig.args[5], x, x_at, I8)
        for r in range(rows):
            quads = quads_of(b, address(b, block, 4 * LANES * r, I8))
            halves = b.load(address(b, scales, 2 * LANES * r, vector(I16, LANES)), align=2)
            scale = ISA.from_half(b, halves)
            for t in range(tokens):
                x_scale = b.load(address(b, xs, 32 * tokens + 4 * t, F32), align=4)
                start = b.load(address(b, xs, 36 * tokens + 4 * t, I32), align=4)
                sums = dot(b, quads, address(b, xs, 32 * t, I8), splat(b, start, LANES))
                both = b.fmul(scale, splat(b, x_scale, LANES))
                n = t * rows + r
                tile[n] = _multiply_add(b, b.sitofp(sums, FLOATS), both, tile[n])
        return cgutils.pack_array(b, tile)

    return generate


@intrinsic(prefer_literal=True)
def multiply_int4(_: Any, tile: Any, tokens: Any, w: Any, at: Any, scales_at: Any, x: Any, x_at: Any) -> Any:
    """tile + an int4 block (nibbles at w[at:], f16 scales at w[scales_at:]) @ x.

    w and x are uint8.  x[x_at:] holds the activations of `tokens` (a constant) tokens: 32 int8 each, then a
    float32 scale each, then an int32 each to start from (the zero point times their sum).
    """
    i64 = types.int64
    return tile(tile, tokens, w, i64, i64, x, i64), _quantized(ISA.int4, ISA.dot4)


@intrinsic(prefer_literal=True)
def multiply_int8(_: Any, tile: Any, tokens: Any, w: Any, at: Any, scales_at: Any, x: Any, x_at: Any) -> Any:
    """tile + an int8 block (bytes at w[at:], f16 scales at w[scales_at:]) @ x; otherwise as multiply_int4."""
    i64 = types.int64
    return tile(tile, tokens, w, i64, i64, x, i64), _quantized(ISA.int8, ISA.dot8)


def _load_bfloat(b: ir.IRBuilder, column: ir.Value, r: int) -> ir.Value:
    bits = b.load(address(b, column, 2 * LANES * r, vector(I16, LANES)), align=2)
    return b.bitcast(b.shl(b.zext(bits, vector(I32, LANES)), constant(I32, LANES, 16)), FLOATS)


def _load_half(b: ir.IRBuilder, column: ir.Value, r: int) -> ir.Value:
    return ISA.from_half(b, b.load(address(b, column, 2 * LANES * r, vector(I16, LANES)), align=2))


def _load_float(b: ir.IRBuilder, column: ir.Value, r: int) -> ir.Value:
    return b.load(address(b, column, 4 * LANES * r, FLOATS), align=4)


def _floating(load: Any) -> Any:
    """The step of a product for one column of floats."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        tile, tokens, w, at, x, x_at, stride = args
        tokens = sig.args[1].literal_value
        tile = cgutils.unpack_tuple(b, tile)
        rows = len(tile) // tokens
        column = _pointer(context, b, sig.args[2], w, at, I8)
        values = []
        for t in range(tokens):
            place = b.add(x_at, b.mul(stride, stride.type(t)))
            value = b.load(_pointer(context, b, sig.args[4], x, place, F32), align=4)
            values.append(splat(b, value, LANES))
        for r in range(rows):
            weights = load(b, column, r)
            for t in range(tokens):
                tile[t * rows + r] = _multiply_add(b, values[t], weights, tile[t * rows + r])
        return cgutils.pack_array(b, tile)

    return generate


@intrinsic(prefer_literal=True)
def multiply_bf16(_: Any, tile: Any, tokens: Any, w: Any, at: Any, x: Any, x_at: Any, stride: Any) -> Any:
    """tile + one column of bfloat16 (uint16 w[at:], a row each) times float32 x[x_at + t * stride]."""
    i64 = types.int64
    return tile(tile, tokens, w, i64, x, i64, i64), _floating(_load_bfloat)


@intrinsic(prefer_literal=True)
def multiply_cached(_: Any, tile: Any, tokens: Any, w: Any, at: Any, x: Any, x_at: Any, stride: Any) -> Any:
    """The same with a column of the KV cache: float16 (uint16 w), or float32."""
    i64 = types.int64
    load = _load_float if w.dtype == types.float32 else _load_half
    return tile(tile, tokens, w, i64, x, i64, i64), _floating(load)
