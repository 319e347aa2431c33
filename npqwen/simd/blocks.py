"""Operations on blocks of an array's elements, as long vectors: LLVM cuts them into the processor's registers."""

from __future__ import annotations

import functools

from llvmlite import ir

from npqwen.format.encodings import BLOCK_COLUMNS, ENCODINGS, UNIT_ROWS
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import (
    F32,
    I8,
    I32,
    Array,
    Const,
    Float,
    Int,
    call,
    constant,
    element,
    operation,
    splat,
    step,
    undefined,
    vector,
)
from npqwen.simd.packed import OCTET


@operation
def quantize_block(
    b: ir.IRBuilder, x: Array, at: Int, out: Array, out_at: Int, pitch: Const, start_at: Int, zero_point: Int
) -> Float:
    """Round 32 float32 x[at:] to int8, the largest magnitude to 127: their scale.

    They go to out[out_at:], every 8 of them `pitch` bytes after the 8 before, and to out[start_at:] the start of their
    products with weights of that zero point (npqwen/simd/packed.py). out: int8.
    """
    floats, words = vector(F32, BLOCK_COLUMNS), vector(I32, BLOCK_COLUMNS)
    values = b.load(element(b, x, at, floats), align=4)
    # Magnitudes of floats order like their bits.
    magnitudes = b.and_(b.bitcast(values, words), constant(I32, BLOCK_COLUMNS, 0x7FFFFFFF))
    peak = b.bitcast(call(b, "llvm.vector.reduce.umax.v32i32", I32, magnitudes), F32)
    usable = b.fcmp_ordered(">", peak, ir.Constant(F32, 1e-30))
    inverse = b.select(usable, b.fdiv(ir.Constant(F32, 127.0), peak), ir.Constant(F32, 0.0))
    rounded = call(b, "llvm.rint.v32f32", floats, b.fmul(values, splat(b, inverse, BLOCK_COLUMNS)))
    integers = b.fptosi(rounded, words)
    stored = b.trunc(integers, vector(I8, BLOCK_COLUMNS))
    together = BLOCK_COLUMNS if pitch == OCTET else OCTET
    for n in range(0, BLOCK_COLUMNS, together):
        lanes = ir.Constant(vector(I32, together), list(range(n, n + together)))
        part = b.shuffle_vector(stored, stored, lanes)
        b.store(part, element(b, out, step(b, out_at, n // OCTET * pitch), part.type), align=1)
    start = ISA.pack_start(b, integers, b.trunc(zero_point, I32))
    b.store(start, element(b, out, start_at, start.type), align=4)
    return b.fmul(peak, ir.Constant(F32, 1 / 127))


@operation
def read_block_row(
    b: ir.IRBuilder, encoding: Int, r: Int, w: Array, at: Int, codebook: Array, row_scale: Float, block_scale: Float,
    out: Array, out_at: Int,
) -> None:  # fmt: skip
    """out[out_at:] = row r (0 to 15) of the block of weights at uint8 w[at:], 32 float32.

    encoding: the code of an integer encoding. codebook: the matrix's, not read if the encoding has none.
    """
    first, lane = b.udiv(r, r.type(ISA.lanes)), b.trunc(b.urem(r, r.type(ISA.lanes)), I32)
    block = element(b, w, b.add(at, b.mul(first, r.type(4 * ISA.lanes))), I8)
    place = element(b, out, out_at, vector(F32, BLOCK_COLUMNS))
    for each in ENCODINGS:
        if each.is_integer:
            with b.if_then(b.icmp_signed("==", encoding, encoding.type(each.code))):
                words = undefined(vector(I32, BLOCK_COLUMNS // 4))
                for n, (quad,) in ISA.quads(b, each, ISA.codebook(b, each, codebook), [block]):
                    word = b.extract_element(b.bitcast(quad, vector(I32, ISA.lanes)), lane)
                    words = b.insert_element(words, word, I32(n))
                stored = b.sext(b.bitcast(words, vector(I8, BLOCK_COLUMNS)), vector(I32, BLOCK_COLUMNS))
                values = b.sub(stored, constant(I32, BLOCK_COLUMNS, each.zero_point))
                # Exact: of at most 15 bits.
                scaled = b.fmul(b.sitofp(values, vector(F32, BLOCK_COLUMNS)), splat(b, block_scale, BLOCK_COLUMNS))
                b.store(b.fmul(scaled, splat(b, row_scale, BLOCK_COLUMNS)), place, align=4)


@operation
def swiglu_block(b: ir.IRBuilder, gate_up: Array, at: Int, out: Array, out_at: Int) -> None:
    """out[out_at:] = silu(gate) * up for 16 of gate at gate_up[at:] and 16 of up after them, float32."""
    kind = vector(F32, UNIT_ROWS)
    gate, up = (b.load(element(b, gate_up, step(b, at, n), kind), align=4) for n in (0, UNIT_ROWS))
    negated = b.fsub(constant(F32, UNIT_ROWS, -0.0), gate)
    denominator = b.fadd(constant(F32, UNIT_ROWS, 1.0), exponential(b, negated))
    b.store(b.fmul(b.fdiv(gate, denominator), up), element(b, out, out_at, kind), align=4)


@operation
def hadamard_block(b: ir.IRBuilder, x: Array, at: Int) -> None:
    """Walsh-Hadamard transform, without its factor 1/4, of 16 float32 x[at:] in place."""
    kind = vector(F32, UNIT_ROWS)
    place = element(b, x, at, kind)
    values = b.load(place, align=4)
    for stride in (1, 2, 4, 8):
        partners = ir.Constant(vector(I32, UNIT_ROWS), [i ^ stride for i in range(UNIT_ROWS)])
        signs = ir.Constant(kind, [-1.0 if i & stride else 1.0 for i in range(UNIT_ROWS)])
        values = b.fadd(b.shuffle_vector(values, values, partners), b.fmul(values, signs))
    b.store(values, place, align=4)


@operation
def softmax_block(
    b: ir.IRBuilder, scores: Array, at: Int, count: Const, visible: Int, row_max: Float
) -> tuple[Float, Float]:
    """Turn `count` scores into weights exp(score - maximum), zero from the `visible`-th on: (maximum, sum of weights).

    scores: float32, scores[at:] is overwritten. The maximum is that of the visible scores and of `row_max`, the row's
    maximum so far.
    """
    kind, words = vector(F32, count), vector(I32, count)
    place = element(b, scores, at, kind)
    values = b.load(place, align=4)
    seen = b.icmp_signed("<", ir.Constant(words, list(range(count))), splat(b, b.trunc(visible, I32), count))
    masked = b.select(seen, values, constant(F32, count, -3.0e38))
    block_max = call(b, f"llvm.vector.reduce.fmax.v{count}f32", F32, masked, fastmath=("nnan",))
    maximum = call(b, "llvm.maxnum.f32", F32, block_max, row_max)
    exponentials = exponential(b, b.fsub(values, splat(b, maximum, count)))
    weights = b.select(seen, exponentials, constant(F32, count, 0.0))
    b.store(weights, place, align=4)
    zero = ir.Constant(F32, 0.0)
    total = call(b, f"llvm.vector.reduce.fadd.v{count}f32", F32, zero, weights, fastmath=("reassoc",))
    return maximum, total


@operation
def softmax_block_int8(
    b: ir.IRBuilder, scores: Array, at: Int, blocks: Const, visible: Int, row_max: Float,
    values: Array, scales_at: Int, pitch: Int, out: Array, out_at: Int,
) -> tuple[Float, Float, Float]:  # fmt: skip
    """Weights exp(score - maximum) times the values' scales, as integers: (maximum, sum of weights, their scale).

    scores: float32, 32 for each block at scores[at:]; those from the `visible`-th on get no weight. The maximum is that
    of the visible scores and of `row_max`, the row's maximum so far. values: uint8, 32 float32 scales at
    values[scales_at:], those of the next block `pitch` bytes after them. out: uint8, out[out_at:] receives integers
    from 0 to 127, the largest 127, which times the scale are the weights times the values' scales. The sum is that of
    the weights alone.
    """
    count = BLOCK_COLUMNS * blocks
    kind, words = vector(F32, count), vector(I32, count)
    loaded = b.load(element(b, scores, at, kind), align=4)
    seen = b.icmp_signed("<", ir.Constant(words, list(range(count))), splat(b, b.trunc(visible, I32), count))
    masked = b.select(seen, loaded, constant(F32, count, -3.0e38))
    block_max = call(b, f"llvm.vector.reduce.fmax.v{count}f32", F32, masked, fastmath=("nnan",))
    maximum = call(b, "llvm.maxnum.f32", F32, block_max, row_max)
    nothing = constant(F32, count, 0.0)
    weights = b.select(seen, exponential(b, b.fsub(loaded, splat(b, maximum, count))), nothing)
    total = call(b, f"llvm.vector.reduce.fadd.v{count}f32", F32, ir.Constant(F32, 0.0), weights, fastmath=("reassoc",))
    part = vector(F32, BLOCK_COLUMNS)
    places = [element(b, values, step(b, scales_at, n, pitch), part) for n in range(blocks)]
    scales = functools.reduce(lambda x, y: _joined(b, x, y), [b.load(place, align=4) for place in places])
    products = b.select(seen, b.fmul(weights, scales), nothing)
    # Magnitudes of floats order like their bits.
    peak = b.bitcast(call(b, f"llvm.vector.reduce.umax.v{count}i32", I32, b.bitcast(products, words)), F32)
    usable = b.fcmp_ordered(">", peak, ir.Constant(F32, 1e-30))
    inverse = b.select(usable, b.fdiv(ir.Constant(F32, 127.0), peak), ir.Constant(F32, 0.0))
    rounded = call(b, f"llvm.rint.v{count}f32", kind, b.fmul(products, splat(b, inverse, count)))
    stored = b.trunc(b.fptosi(rounded, words), vector(I8, count))
    b.store(stored, element(b, out, out_at, stored.type), align=1)
    return maximum, total, b.fmul(peak, ir.Constant(F32, 1 / 127))


def _joined(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The elements of x, then those of y."""
    if x.type != y.type:
        raise TypeError("vectors of different lengths")
    return b.shuffle_vector(x, y, ir.Constant(vector(I32, 2 * x.type.count), list(range(2 * x.type.count))))


@operation
def reduce_max(b: ir.IRBuilder, values: Array, at: Int, count: Const) -> Float:
    """The greatest of `count` float32 values[at:]; NaN if there is one."""
    loaded = b.load(element(b, values, at, vector(F32, count)), align=4)
    return call(b, f"llvm.vector.reduce.fmaximum.v{count}f32", F32, loaded)


def exponential(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e**x for a vector of float32, within about 2 ulp; clamped to about 1e-38 and 1e38."""
    kind = x.type
    n = kind.count

    def const(value: float) -> ir.Constant:
        return constant(F32, n, value)

    y = b.fmul(x, const(1.44269504))  # e**x = 2**y, the power of two of y's nearest integer by a polynomial of the rest
    y = call(b, f"llvm.minnum.v{n}f32", kind, call(b, f"llvm.maxnum.v{n}f32", kind, y, const(-126.0)), const(126.0))
    whole = call(b, f"llvm.rint.v{n}f32", kind, y)
    rest = b.fsub(y, whole)
    p = const(1.5403530e-4)
    for coefficient in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        p = call(b, f"llvm.fma.v{n}f32", kind, p, rest, const(coefficient))
    exponent = b.add(b.fptosi(whole, vector(I32, n)), constant(I32, n, 127))
    return b.fmul(p, b.bitcast(b.shl(exponent, constant(I32, n, 23)), kind))
