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

from npqwen.format.encodings import BLOCK_COLUMNS, ENCODINGS, Encoding
from npqwen.simd.instructions import (
    AHEAD,
    CACHE_LINE,
    F32,
    I8,
    I16,
    I32,
    address,
    call,
    constant,
    prefetch_line,
    splat,
    vector,
)
from npqwen.simd.isa import ISA

LANES = ISA.lanes
FLOATS = vector(F32, LANES)
WORDS = vector(I32, LANES)
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


def pointer(context: Any, b: ir.IRBuilder, kind: Any, array: Any, at: Any, to: ir.Type) -> ir.Value:
    data = context.make_array(kind)(context, b, array).data
    return b.bitcast(b.gep(data, [at]), to.as_pointer())


def multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return call(b, f"llvm.fma.v{LANES}f32", FLOATS, x, y, z)


@intrinsic(prefer_literal=True)
def prefetch(_: Any, array: Any, at: Any, size: Any) -> Any:
    """Ask for the `size` (a constant) bytes of array[at:]; they need not exist."""
    sig = types.void(array, types.int64, size)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        place = pointer(context, b, sig.args[0], args[0], args[1], I8)
        for line in range(0, sig.args[2].literal_value, CACHE_LINE):
            prefetch_line(b, address(b, place, line, I8))
        return context.get_dummy_value()

    return sig, generate


def chains(vectors: int) -> int:
    """How many independent sums of each of so many accumulators keep the processor busy: 4, 2 or 1."""
    return max(1, min(4, ISA.accumulators // vectors))


@intrinsic(prefer_literal=True)
def zeros(_: Any, tokens: Any, rows: Any, columns: Any) -> Any:
    """A tile of zeros of tokens * rows * columns vectors, all constants."""
    kind = types.UniTuple(f32s, tokens.literal_value * rows.literal_value * columns.literal_value)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return cgutils.pack_array(b, [constant(F32, LANES, 0.0)] * sig.return_type.count)

    return kind(tokens, rows, columns), generate


def _spread(context: Any, b: ir.IRBuilder, sig: Any, args: Any, plus: bool) -> Any:
    """Write or add a tile's vectors to out[at + t * stride + r * LANES:]."""
    tile, out, at, rows, stride = args
    rows = sig.args[3].literal_value
    for n, value in enumerate(cgutils.unpack_tuple(b, tile)):
        t, r = divmod(n, rows)
        place = b.add(at, b.add(b.mul(stride, stride.type(t)), stride.type(r * LANES)))
        where = pointer(context, b, sig.args[1], out, place, FLOATS)
        b.store(b.fadd(b.load(where, align=4), value) if plus else value, where, align=4)
    return context.get_dummy_value()


@intrinsic(prefer_literal=True)
def store(_: Any, tile: Any, out: Any, at: Any, rows: Any, stride: Any) -> Any:
    """Write a tile to float32 out[at + t * stride + r * LANES:]; rows (vectors a token) is a constant."""
    sig = types.void(tile, out, types.int64, rows, types.int64)
    return sig, lambda context, b, sig, args: _spread(context, b, sig, args, plus=False)


@intrinsic(prefer_literal=True)
def store_apart(_: Any, tile: Any, columns: Any, out: Any, at: Any, pitch: Any, rows: Any, stride: Any) -> Any:
    """Write the tiles of `columns` (a constant) columns, each where `store` would, `pitch` after the one before."""
    i64 = types.int64
    sig = types.void(tile, columns, out, i64, i64, rows, i64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        tile, _, out, at, pitch, _, stride = args
        rows, parts = sig.args[5].literal_value, cgutils.unpack_tuple(b, tile)
        tokens = len(parts) // (sig.args[1].literal_value * rows)
        for n, value in enumerate(parts):
            (c, t), r = divmod(n // rows, tokens), n % rows
            place = b.add(at, b.add(b.mul(pitch, pitch.type(c)), b.mul(stride, stride.type(t))))
            where = pointer(context, b, sig.args[2], out, b.add(place, place.type(r * LANES)), FLOATS)
            b.store(value, where, align=4)
        return context.get_dummy_value()

    return sig, generate


@intrinsic(prefer_literal=True)
def add(_: Any, tile: Any, out: Any, at: Any, rows: Any, stride: Any) -> Any:
    """Add a tile to what stands there."""
    sig = types.void(tile, out, types.int64, rows, types.int64)
    return sig, lambda context, b, sig, args: _spread(context, b, sig, args, plus=True)


def _quantized(encoding: Encoding) -> Any:
    """The step of a product for one block of 32 columns of an integer encoding."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        tile, _, _, w, at, scales_at, x, x_at = args
        tokens = sig.args[1].literal_value
        tile = cgutils.unpack_tuple(b, tile)
        rows = len(tile) // tokens
        block = pointer(context, b, sig.args[3], w, at, I8)
        scales = pointer(context, b, sig.args[3], w, scales_at, I8)
        xs = pointer(context, b, sig.args[6], x, x_at, I8)
        for r in range(rows):
            products = ISA.products(b, encoding, address(b, block, 4 * LANES * r, I8), xs, tokens)
            halves = b.load(address(b, scales, 2 * LANES * r, vector(I16, LANES)), align=2)
            scale = ISA.from_half(b, halves)
            for t, sums in enumerate(products):
                x_scale = b.load(address(b, xs, 32 * tokens + 4 * t, F32), align=4)
                # Not the scales first: LLVM would make that product early, and have no register for it.
                scaled = b.fmul(ISA.to_float(b, sums), splat(b, x_scale, LANES))
                n = t * rows + r
                tile[n] = multiply_add(b, scaled, scale, tile[n])
        return cgutils.pack_array(b, tile)

    return generate


@intrinsic(prefer_literal=True)
def dot_block_int(
    _: Any, tile: Any, tokens: Any, encoding: Any, w: Any, at: Any, scales_at: Any, x: Any, x_at: Any
) -> Any:
    """tile + a block of an integer encoding (weights at w[at:], f16 scales at w[scales_at:]) @ x.

    tokens and encoding (its code) are constants; w and x are uint8.  x[x_at:] holds the activations of the tokens as
    kernels/packing.py describes them.
    """
    i64 = types.int64
    return tile(tile, tokens, encoding, w, i64, i64, x, i64), _quantized(ENCODINGS[encoding.literal_value])


@intrinsic
def read_block_row(_: Any, encoding: Any, r: Any, w: Any, at: Any, scale: Any, out: Any, out_at: Any) -> Any:
    """out[out_at:] = scale * row r (0 to 15) of the block at w[at:], 32 float32; encoding: an integer one's code."""
    i64 = types.int64
    sig = types.void(i64, i64, w, i64, types.float32, out, i64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        code, r, w, at, scale, out, out_at = args
        vector_of_r, lane = b.udiv(r, r.type(LANES)), b.trunc(b.urem(r, r.type(LANES)), I32)
        block = pointer(context, b, sig.args[2], w, b.add(at, b.mul(vector_of_r, r.type(4 * LANES))), I8)
        place = pointer(context, b, sig.args[5], out, out_at, vector(F32, BLOCK_COLUMNS))
        for encoding in ENCODINGS:
            if encoding.is_integer:
                with b.if_then(b.icmp_signed("==", code, code.type(encoding.code))):
                    words = ir.Constant(vector(I32, 8), ir.Undefined)
                    for n, quad in ISA.quads(b, encoding, block):
                        words = b.insert_element(words, b.extract_element(b.bitcast(quad, WORDS), lane), I32(n))
                    stored = b.bitcast(words, vector(I8, BLOCK_COLUMNS))
                    integers = b.sub(b.sext(stored, vector(I32, 32)), constant(I32, 32, encoding.zero_point))
                    floats = b.sitofp(integers, vector(F32, 32))
                    b.store(b.fmul(floats, splat(b, scale, 32)), place, align=4)
        return context.get_dummy_value()

    return sig, generate


def _load_bfloat(b: ir.IRBuilder, column: ir.Value, r: int) -> ir.Value:
    bits = b.load(address(b, column, 2 * LANES * r, vector(I16, LANES)), align=2)
    return b.bitcast(b.shl(b.zext(bits, vector(I32, LANES)), constant(I32, LANES, 16)), FLOATS)


def _load_half(b: ir.IRBuilder, column: ir.Value, r: int) -> ir.Value:
    return ISA.from_half(b, b.load(address(b, column, 2 * LANES * r, vector(I16, LANES)), align=2))


def _load_float(b: ir.IRBuilder, column: ir.Value, r: int) -> ir.Value:
    return b.load(address(b, column, 4 * LANES * r, FLOATS), align=4)


def _floating(load: Any) -> Any:
    """The step of a product for some columns of floats."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        tile, _, _, w, at, pitch, x, x_at, step, stride = args
        tokens, columns = sig.args[1].literal_value, sig.args[2].literal_value
        tile = cgutils.unpack_tuple(b, tile)
        rows = len(tile) // (tokens * columns)
        for c in range(columns):
            column = pointer(context, b, sig.args[3], w, b.add(at, b.mul(pitch, pitch.type(c))), I8)
            first = b.add(x_at, b.mul(step, step.type(c)))
            values = []
            for t in range(tokens):
                place = b.add(first, b.mul(stride, stride.type(t)))
                value = b.load(pointer(context, b, sig.args[6], x, place, F32), align=4)
                values.append(splat(b, value, LANES))
            for r in range(rows):
                weights = load(b, column, r)
                for t in range(tokens):
                    n = (c * tokens + t) * rows + r
                    tile[n] = multiply_add(b, values[t], weights, tile[n])
        return cgutils.pack_array(b, tile)

    return generate


@intrinsic(prefer_literal=True)
def multiply_bf16(
    _: Any, tile: Any, tokens: Any, columns: Any, w: Any, at: Any, pitch: Any, x: Any, x_at: Any, step: Any, stride: Any
) -> Any:
    """Multiply some columns of bfloat16 and float32 activations, in a tile for each of the columns.

    Column c is uint16 w[at + c * pitch:], a row each; its activations are x[x_at + c * step + t * stride].  tokens and
    columns are constants; the tile has tokens * columns * rows vectors, which `reduce_columns`
    adds up to tokens * rows.
    """
    i64 = types.int64
    return tile(tile, tokens, columns, w, i64, i64, x, i64, i64, i64), _floating(_load_bfloat)


@intrinsic(prefer_literal=True)
def multiply_cached(
    _: Any, tile: Any, tokens: Any, columns: Any, w: Any, at: Any, pitch: Any, x: Any, x_at: Any, step: Any, stride: Any
) -> Any:
    """The same with columns of the KV cache: float16 (uint16 w), or float32."""
    i64 = types.int64
    load = _load_float if w.dtype == types.float32 else _load_half
    return tile(tile, tokens, columns, w, i64, i64, x, i64, i64, i64), _floating(load)


@intrinsic(prefer_literal=True)
def reduce_columns(_: Any, tile: Any, columns: Any) -> Any:
    """Add up the tiles of `columns` (a constant) columns: independent sums keep the processor busy, one is wanted."""
    kind = types.UniTuple(f32s, tile.count // columns.literal_value)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        parts = cgutils.unpack_tuple(b, args[0])
        count = sig.return_type.count
        sums = parts[:count]
        for n, part in enumerate(parts[count:]):
            sums[n % count] = b.fadd(sums[n % count], part)
        return cgutils.pack_array(b, sums)

    return kind(tile, columns), generate


@intrinsic(prefer_literal=True)
def add_up(_: Any, tile: Any, array: Any, at: Any, count: Any) -> Any:
    """tile + the `count` (a constant) float32 array[at:], one vector to each of the tile's in turn.

    Each line is asked for, ahead, as it is read.
    """

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        parts = cgutils.unpack_tuple(b, args[0])
        for n in range(sig.args[3].literal_value // LANES):
            place = b.add(args[2], args[2].type(n * LANES))
            where = pointer(context, b, sig.args[1], args[1], place, FLOATS)
            if n * LANES * 4 % CACHE_LINE == 0:
                prefetch_line(b, address(b, where, AHEAD, I8))
            value = b.load(where, align=4)
            parts[n % len(parts)] = b.fadd(parts[n % len(parts)], value)
        return cgutils.pack_array(b, parts)

    return tile(tile, array, types.int64, count), generate


@intrinsic(prefer_literal=True)
def quantize_block(_: Any, x: Any, at: Any, out: Any, out_at: Any, pitch: Any) -> Any:
    """Round 32 float32 x[at:] to int8, the largest magnitude to 127: (scale float32, sum int32).

    They go to out[out_at:], each 8 of them `pitch` (a constant) bytes after the 8 before.
    """
    sig = types.Tuple((types.float32, types.int32))(x, types.int64, out, types.int64, pitch)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        floats, words, bytes_ = vector(F32, 32), vector(I32, 32), vector(I8, 32)
        values = b.load(pointer(context, b, sig.args[0], args[0], args[1], floats), align=4)
        sizes = b.and_(b.bitcast(values, words), constant(I32, 32, 0x7FFFFFFF))
        peak = b.bitcast(call(b, "llvm.vector.reduce.umax.v32i32", I32, sizes), F32)
        some = b.fcmp_ordered(">", peak, ir.Constant(F32, 1e-30))
        inverse = b.select(some, b.fdiv(ir.Constant(F32, 127.0), peak), ir.Constant(F32, 0.0))
        whole = call(b, "llvm.rint.v32f32", floats, b.fmul(values, splat(b, inverse, 32)))
        integers = b.fptosi(whole, words)
        small = b.trunc(integers, bytes_)
        piece = 32 if sig.args[4].literal_value == 8 else 8
        for n in range(0, 32, piece):
            part = b.shuffle_vector(small, small, ir.Constant(vector(I32, piece), list(range(n, n + piece))))
            place = b.add(args[3], args[3].type(n // 8 * sig.args[4].literal_value))
            b.store(part, pointer(context, b, sig.args[2], args[2], place, part.type), align=1)
        total = call(b, "llvm.vector.reduce.add.v32i32", I32, integers)
        return context.make_tuple(b, sig.return_type, [b.fmul(peak, ir.Constant(F32, 1 / 127)), total])

    return sig, generate


def _exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e**x for a vector of float32, within about 2 ulp; clamped to about 1e-38 and 1e38."""
    kind = x.type
    n = kind.count

    def const(value: float) -> ir.Constant:
        return constant(F32, n, value)

    y = b.fmul(x, const(1.44269504))
    y = call(b, f"llvm.minnum.v{n}f32", kind, call(b, f"llvm.maxnum.v{n}f32", kind, y, const(-126.0)), const(126.0))
    whole = call(b, f"llvm.rint.v{n}f32", kind, y)
    f = b.fsub(y, whole)
    p = const(1.5403530e-4)
    for term in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        p = call(b, f"llvm.fma.v{n}f32", kind, p, f, const(term))
    words = vector(I32, n)
    power = b.shl(b.add(b.fptosi(whole, words), constant(I32, n, 127)), constant(I32, n, 23))
    return b.fmul(p, b.bitcast(power, kind))


@intrinsic
def silu_times_block(_: Any, gate_up: Any, at: Any, out: Any, out_at: Any) -> Any:
    """out[out_at:] = silu(gate) * up for 16 of gate at gate_up[at:] and 16 of up after them, float32."""
    sig = types.void(gate_up, types.int64, out, types.int64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        kind = vector(F32, ROWS)
        gate, up = (
            b.load(pointer(context, b, sig.args[0], args[0], b.add(args[1], args[1].type(n)), kind), align=4)
            for n in (0, ROWS)
        )
        below = b.fadd(constant(F32, ROWS, 1.0), _exp(b, b.fsub(constant(F32, ROWS, -0.0), gate)))
        place = pointer(context, b, sig.args[2], args[2], args[3], kind)
        b.store(b.fmul(b.fdiv(gate, below), up), place, align=4)
        return context.get_dummy_value()

    return sig, generate


@intrinsic(prefer_literal=True)
def softmax_block(_: Any, scores: Any, at: Any, count: Any, visible: Any, top: Any) -> Any:
    """Turn `count` (a constant) scores into weights exp(score - largest), zero from the `visible`-th on.

    scores: float32, scores[at:] is overwritten.  top: the row's largest so far.  Returns (largest, sum of weights).
    """
    sig = types.Tuple((types.float32, types.float32))(scores, types.int64, count, types.int64, types.float32)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        n = sig.args[2].literal_value
        kind, words = vector(F32, n), vector(I32, n)
        place = pointer(context, b, sig.args[0], args[0], args[1], kind)
        values = b.load(place, align=4)
        numbers = ir.Constant(words, list(range(n)))
        seen = b.icmp_signed("<", numbers, splat(b, b.trunc(args[3], I32), n))
        masked = b.select(seen, values, constant(F32, n, -3.0e38))
        name = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(F32, [kind]), f"llvm.vector.reduce.fmax.v{n}f32"
        )
        largest = call(b, "llvm.maxnum.f32", F32, b.call(name, [masked], fastmath=("nnan",)), args[4])
        weights = b.select(seen, _exp(b, b.fsub(values, splat(b, largest, n))), constant(F32, n, 0.0))
        b.store(weights, place, align=4)
        adder = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(F32, [F32, kind]), f"llvm.vector.reduce.fadd.v{n}f32"
        )
        total = b.call(adder, [ir.Constant(F32, 0.0), weights], fastmath=("reassoc",))
        return context.make_tuple(b, sig.return_type, [largest, total])

    return sig, generate


@intrinsic(prefer_literal=True)
def reduce_max(_: Any, values: Any, at: Any, count: Any) -> Any:
    """The greatest of `count` (a constant) float32 values[at:]; NaN if there is one."""
    sig = types.float32(values, types.int64, count)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        n = sig.args[2].literal_value
        place = pointer(context, b, sig.args[0], args[0], args[1], vector(F32, n))
        return call(b, f"llvm.vector.reduce.fmaximum.v{n}f32", F32, b.load(place, align=4))

    return sig, generate
