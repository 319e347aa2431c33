"""Operations on blocks of an array's elements, as long vectors, which LLVM splits into the processor's registers."""

from __future__ import annotations

import functools
from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils

from npqwen.format.encodings import BLOCK_COLUMNS, ENCODINGS, UNIT_ROWS
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import (
    F32,
    I8,
    I32,
    I64,
    Array,
    Const,
    Float,
    Int,
    call,
    constant,
    element,
    fma,
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
    """Round 32 float32 x[at:] to int8, the largest magnitude to 127; return their scale.

    They go to out[out_at:], each 8 of them `pitch` bytes after the previous 8; out[start_at:] receives the start of
    their products with weights of that zero point (npqwen/simd/packed.py). out: int8.
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
                # Exact: at most 15 bits.
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
    """Turn `count` scores into weights exp(score - maximum), zero from index `visible`: (maximum, sum of weights).

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
def softmax_rows_int8(
    b: ir.IRBuilder, rows: Const, all_visible: Const, scores: Array, at: Int, blocks: Const, visible: Int,
    row_max: Array, row: Int, values: Array, scales_at: Int, pitch: Int, out: Array, out_at: Int,
    maxima: Array, totals: Array, scales: Array,
) -> None:  # fmt: skip
    """Weights exp(score - maximum) times the values' scales, as integers, of `rows` rows, a power of two, side by side.

    scores: float32, 32 for each block at scores[at:], followed by those of the next row; in each row, those starting at
    index `visible` get no weight, unless `all_visible`. values: uint8, 32 float32 scales at values[scales_at:], those
    of the next block `pitch` bytes further. out: uint8, out[out_at:] receives integers from 0 to 127, each row's
    largest 127, which times scales[row] are the weights times the values' scales.

    maxima[row] becomes the maximum of the row's visible scores and row_max[row], totals[row] the sum of its weights.
    row_max, maxima, totals and scales are float32, used starting at index `row`.
    """
    count, each = BLOCK_COLUMNS * blocks, range(rows)
    kind, words, row_kind = vector(F32, count), vector(I32, count), vector(F32, rows)
    loaded = [b.load(element(b, scores, step(b, at, n, count), kind), align=4) for n in each]
    seen = None if all_visible else b.icmp_signed(
        "<", ir.Constant(words, list(range(count))), splat(b, b.trunc(visible, I32), count)
    )

    def shown(vectors: list[ir.Value], otherwise: float) -> list[ir.Value]:
        if seen is None:
            return vectors
        return [b.select(seen, v, constant(F32, count, otherwise)) for v in vectors]

    def spread(by_row: ir.Value) -> list[ir.Value]:
        return [b.shuffle_vector(by_row, by_row, constant(I32, count, n)) for n in each]

    def greater(x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    def stored_to(array: ir.Value, value: ir.Value) -> None:
        b.store(value, element(b, array, row, row_kind), align=4)

    so_far = b.load(element(b, row_max, row, row_kind), align=4)
    maximum = greater(_reduced(b, greater, shown(loaded, -3.0e38)), so_far)
    stored_to(maxima, maximum)
    log2 = constant(F32, count, 1.44269504)
    lowered = spread(b.fmul(maximum, constant(F32, rows, -1.44269504)))
    weights = shown(_powers_of_two(b, [fma(b, x, log2, y) for x, y in zip(loaded, lowered, strict=True)]), 0.0)
    stored_to(totals, _reduced(b, b.fadd, weights))
    part = vector(F32, BLOCK_COLUMNS)
    places = [element(b, values, step(b, scales_at, n, pitch), part) for n in range(blocks)]
    value_scales = functools.reduce(lambda x, y: _joined(b, x, y), [b.load(place, align=4) for place in places])
    products = shown([b.fmul(w, value_scales) for w in weights], 0.0)
    peak = _reduced(b, greater, products)
    usable = b.fcmp_ordered(">", peak, constant(F32, rows, 1e-30))
    inverse = b.select(usable, b.fdiv(constant(F32, rows, 127.0), peak), constant(F32, rows, 0.0))
    stored_to(scales, b.fmul(peak, constant(F32, rows, 1 / 127)))
    rounding = constant(F32, count, _ROUNDING)
    rounded = [fma(b, x, y, rounding) for x, y in zip(products, spread(inverse), strict=True)]
    for n, value in enumerate(rounded):
        integers = b.trunc(b.bitcast(value, words), vector(I8, count))
        b.store(integers, element(b, out, step(b, out_at, n, count), integers.type), align=1)


def _reduced(b: ir.IRBuilder, pair: Callable[[ir.Value, ir.Value], ir.Value], rows: list[ir.Value]) -> ir.Value:
    """Each row's elements reduced to one, by halves: a vector with an element for each row.

    rows: at most 16, a power of two. The order does not depend on the number of rows, so neither do the sums.
    """

    def halves(x: ir.Value, y: ir.Value, lanes: list[int], size: int) -> ir.Value:
        first, second = (ir.Constant(vector(I32, len(lanes)), [i + n for i in lanes]) for n in (0, size))
        return pair(b.shuffle_vector(x, y, first), b.shuffle_vector(x, y, second))

    size = rows[0].type.count
    while size > UNIT_ROWS:
        size //= 2
        rows = [halves(x, x, list(range(size)), size) for x in rows]
    while len(rows) > 1:  # two vectors become one, each row's part half as long
        size //= 2
        lanes = [start + i for start in range(0, 2 * UNIT_ROWS, 2 * size) for i in range(size)]
        rows = [halves(x, y, lanes, size) for x, y in zip(rows[::2], rows[1::2], strict=True)]
    (reduced,) = rows
    count = reduced.type.count // size
    while size > 1:
        size //= 2
        lanes = [start + i for start in range(0, 2 * size * count, 2 * size) for i in range(size)]
        reduced = halves(reduced, reduced, lanes, size)
    return reduced


_ROUNDING = 1.5 * 2.0**23
"""Added to a float32 of less than 2**22, it leaves the nearest integer in the low bits."""


def _powers_of_two(b: ir.IRBuilder, exponents: list[ir.Value]) -> list[ir.Value]:
    """2**y of float32 vectors of numbers up to 0, within 4e-6 of the value; at least about 2**-126."""
    kind = exponents[0].type
    n, words = kind.count, vector(I32, kind.count)

    def const(value: float) -> ir.Constant:
        return constant(F32, n, value)

    clamped = [call(b, f"llvm.maxnum.v{n}f32", kind, y, const(-126.0)) for y in exponents]
    wholes = [call(b, f"llvm.rint.v{n}f32", kind, y) for y in clamped]
    rests = [b.fsub(y, whole) for y, whole in zip(clamped, wholes, strict=True)]
    powers = [const(9.6181291e-3) for _ in rests]
    for coefficient in (5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
        powers = [fma(b, p, rest, const(coefficient)) for p, rest in zip(powers, rests, strict=True)]
    shifts = [b.shl(b.bitcast(b.fadd(x, const(_ROUNDING)), words), constant(I32, n, 23)) for x in wholes]
    return [b.bitcast(b.add(b.bitcast(p, words), x), kind) for p, x in zip(powers, shifts, strict=True)]


def _joined(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The elements of x, then those of y."""
    if x.type != y.type:
        raise TypeError("vectors of different lengths")
    return b.shuffle_vector(x, y, ir.Constant(vector(I32, 2 * x.type.count), list(range(2 * x.type.count))))


@operation
def dot(b: ir.IRBuilder, x: Array, y: Array, count: Int) -> Float:
    """The sum of x[i] * y[i] for `count` float32, added in an order that depends only on `count`."""
    kind = vector(F32, BLOCK_COLUMNS)
    sums, rest = (cgutils.alloca_once_value(b, start) for start in (constant(F32, BLOCK_COLUMNS, 0.0), F32(0.0)))
    whole = b.mul(b.sdiv(count, I64(BLOCK_COLUMNS)), I64(BLOCK_COLUMNS))
    with cgutils.for_range_slice(b, I64(0), whole, I64(BLOCK_COLUMNS), I64) as (i, _):
        left, right = (b.load(element(b, array, i, kind), align=4) for array in (x, y))
        b.store(fma(b, left, right, b.load(sums)), sums)
    with cgutils.for_range_slice(b, whole, count, I64(1), I64) as (i, _):
        left, right = (b.load(b.gep(array, [i])) for array in (x, y))
        b.store(call(b, "llvm.fma.f32", F32, left, right, b.load(rest)), rest)
    total = call(b, f"llvm.vector.reduce.fadd.v{BLOCK_COLUMNS}f32", F32, F32(-0.0), b.load(sums), fastmath=("reassoc",))
    return b.fadd(total, b.load(rest))


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
