"""Operations of gated DeltaNet layers: on rows of a recurrent state, and on 16 values at a time around it.

A head's state lies in blocks of 16 value coordinates by all key coordinates: a *row* is one key coordinate's 16 values
of a block. The tiles of these operations hold, one after another, the rows of one or two neighbouring blocks. The
number and order of the terms that an operation adds up depend on the layer's shape alone: a token's results are bitwise
equal however tokens are divided into passes.
"""

from __future__ import annotations

from collections.abc import Iterator

from llvmlite import ir
from numba import types

from npqwen.simd.blocks import exponential
from npqwen.simd.llvm import (
    F32,
    I32,
    Array,
    Float,
    Int,
    Tile,
    call,
    constant,
    element,
    fma,
    operation,
    splat,
    step,
    vector,
)
from npqwen.simd.tile import FLOATS, LANES, f32s

ROW = 16
"""float32 of a row."""
ROWS_AT_ONCE = 2
"""Rows of a block that are processed at once, each with its own sums of products."""
_KIND = vector(F32, ROW)
_VECTORS = ROW // LANES


def _place(b: ir.IRBuilder, array: ir.Value, at: ir.Value, row: int, n: int, pitch: ir.Value) -> ir.Value:
    """Where vector n of a tile lies, `row` rows after array[at]; pitch: float32 between blocks."""
    block, part = divmod(n, _VECTORS)
    return element(b, array, step(b, step(b, at, block, pitch), row * ROW + part * LANES), FLOATS)


def _factor(b: ir.IRBuilder, array: ir.Value, at: ir.Value, row: int) -> ir.Value:
    """array[at + row] in every lane."""
    return splat(b, b.load(element(b, array, step(b, at, row), F32), align=4), LANES)


def _add_products(
    b: ir.IRBuilder, sums: list[ir.Value], row: int, rows: list[ir.Value], key: ir.Value, query: ir.Value
) -> None:
    """Add a row's products with the key and the query to that row's sums."""
    count = len(rows)
    for which, factor in enumerate((key, query)):
        for n, value in enumerate(rows):
            at = (2 * row + which) * count + n
            sums[at] = fma(b, value, factor, sums[at])


@operation
def dot_rows(
    b: ir.IRBuilder, sums: Tile, state: Array, at: Int, pitch: Int, inputs: Array, key_at: Int, query_at: Int
) -> Tile:
    """sums + the products of ROWS_AT_ONCE rows state[at:] with as many coordinates of a key and of a query.

    sums: for each of the rows, a tile of products with keys, one of products with queries. pitch: float32 from one
    block to the next. inputs: float32, the key's coordinates at inputs[key_at:], the query's at inputs[query_at:].
    """
    count = len(sums) // (2 * ROWS_AT_ONCE)
    rows = [[b.load(_place(b, state, at, row, n, pitch), align=4) for n in range(count)] for row in range(ROWS_AT_ONCE)]
    for row in range(ROWS_AT_ONCE):
        key, query = _factor(b, inputs, key_at, row), _factor(b, inputs, query_at, row)
        _add_products(b, sums, row, rows[row], key, query)
    return sums


@operation
def update_rows(
    b: ir.IRBuilder, deltas: Tile, decay: Float, source: Array, at: Int, target: Array, target_at: Int, pitch: Int,
    inputs: Array, key_at: Int,
) -> None:  # fmt: skip
    """target = decay * source + key coordinate * deltas, ROWS_AT_ONCE rows; arguments as those of `dot_rows`."""
    for row, values in enumerate(_updated(b, deltas, decay, source, at, pitch, inputs, key_at)):
        for n, value in enumerate(values):
            b.store(value, _place(b, target, target_at, row, n, pitch), align=4)


@operation
def stream_rows(
    b: ir.IRBuilder, deltas: Tile, decay: Float, source: Array, at: Int, target: Array, target_at: Int, pitch: Int,
    inputs: Array, key_at: Int,
) -> None:  # fmt: skip
    """`update_rows` with non-temporal stores, to a target aligned to a cache line."""
    mark = b.module.add_metadata([ir.Constant(I32, 1)])
    for row, values in enumerate(_updated(b, deltas, decay, source, at, pitch, inputs, key_at)):
        for n, value in enumerate(values):
            stored = b.store(value, _place(b, target, target_at, row, n, pitch), align=4 * LANES)
            stored.set_metadata("nontemporal", mark)


@operation
def update_dot_rows(
    b: ir.IRBuilder, sums: Tile, deltas: Tile, decay: Float, source: Array, at: Int, target: Array, target_at: Int,
    pitch: Int, inputs: Array, key_at: Int, next_key_at: Int, next_query_at: Int,
) -> Tile:  # fmt: skip
    """`update_rows`, then `dot_rows` of the updated rows with the next token's key and query."""
    for row, values in enumerate(_updated(b, deltas, decay, source, at, pitch, inputs, key_at)):
        key, query = (_factor(b, inputs, place, row) for place in (next_key_at, next_query_at))
        _add_products(b, sums, row, values, key, query)
        for n, value in enumerate(values):
            b.store(value, _place(b, target, target_at, row, n, pitch), align=4)
    return sums


def _updated(
    b: ir.IRBuilder, deltas: list[ir.Value], decay: ir.Value, source: ir.Value, at: ir.Value, pitch: ir.Value,
    inputs: ir.Value, key_at: ir.Value,
) -> Iterator[list[ir.Value]]:  # fmt: skip
    """The rows that `update_rows` writes, one by one, as registers are few."""
    factor = splat(b, decay, LANES)
    for row in range(ROWS_AT_ONCE):
        key = _factor(b, inputs, key_at, row)
        before = [b.load(_place(b, source, at, row, n, pitch), align=4) for n in range(len(deltas))]
        yield [fma(b, key, delta, b.fmul(factor, old)) for delta, old in zip(deltas, before, strict=True)]


def _vectors_of(sums: types.UniTuple, *_: types.Type | int) -> types.UniTuple:
    return types.UniTuple(f32s, len(sums) // (2 * ROWS_AT_ONCE))


@operation(returns=_vectors_of)
def finish_token(
    b: ir.IRBuilder, sums: Tile, values: Array, at: Int, gates: Array, decay_at: Int, beta_at: Int, product_at: Int,
    out: Array, out_at: Int,
) -> Tile:  # fmt: skip
    """From the sums of `dot_rows` over the state before a token, the deltas: what the token adds per key coordinate.

    deltas = beta * (value - decay * key @ state), and the output, out = query @ new state, is
    decay * query @ state + (key @ query) * deltas. values: float32, the token's at values[at:]. gates: float32 with
    decay, beta and key @ query at these indices.
    """
    count = len(sums) // (2 * ROWS_AT_ONCE)
    decay, beta, product = (
        splat(b, b.load(element(b, gates, place, F32), align=4), LANES) for place in (decay_at, beta_at, product_at)
    )
    deltas = []
    for n in range(count):
        read, answer = (b.fadd(sums[k * count + n], sums[(2 + k) * count + n]) for k in range(2))
        value = b.load(element(b, values, step(b, at, n * LANES), FLOATS), align=4)
        delta = b.fmul(beta, b.fsub(value, b.fmul(decay, read)))
        answered = fma(b, product, delta, b.fmul(decay, answer))
        b.store(answered, element(b, out, step(b, out_at, n * LANES), FLOATS), align=4)
        deltas.append(delta)
    return deltas


@operation
def copy_block(b: ir.IRBuilder, source: Array, target: Array, at: Int) -> None:
    """target[at:] = source[at:], 16 float32."""
    b.store(b.load(element(b, source, at, _KIND), align=4), element(b, target, at, _KIND), align=4)


@operation
def stream_block(b: ir.IRBuilder, source: Array, target: Array, at: Int) -> None:
    """`copy_block` with non-temporal stores, to a target aligned to a cache line."""
    stored = b.store(b.load(element(b, source, at, _KIND), align=4), element(b, target, at, _KIND), align=4 * ROW)
    stored.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


@operation
def convolve_block(
    b: ir.IRBuilder, oldest: Array, older: Array, old: Array, newest: Array, at: Int, weights: Array, pitch: Int,
    out: Array, out_at: Int,
) -> None:  # fmt: skip
    """out[out_at:] = silu of the causal convolution of 16 channels: the tokens' rows at [at:] times their taps.

    weights: float32, those of the oldest row at weights[at:], those of each next row `pitch` further.
    """
    total = constant(F32, ROW, 0.0)
    for n, row in enumerate((oldest, older, old, newest)):
        x = b.load(element(b, row, at, _KIND), align=4)
        weight = b.load(element(b, weights, step(b, at, n, pitch), _KIND), align=4)
        total = b.fmul(x, weight) if n == 0 else fma(b, x, weight, total)
    b.store(_silu(b, total), element(b, out, out_at, _KIND), align=4)


@operation
def add_block_products(b: ir.IRBuilder, sums: Tile, x: Array, at: Int, y: Array, y_at: Int) -> Tile:
    """sums, 16 float32, + the products of x[at:] and y[y_at:]."""
    for n in range(_VECTORS):
        left = b.load(element(b, x, step(b, at, n * LANES), FLOATS), align=4)
        right = b.load(element(b, y, step(b, y_at, n * LANES), FLOATS), align=4)
        sums[n] = fma(b, left, right, sums[n])
    return sums


@operation
def add_up(b: ir.IRBuilder, sums: Tile) -> Float:
    """The sum of all float32 of a tile of 16."""
    total = sums[0]
    for value in sums[1:]:
        total = b.fadd(total, value)
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (ir.Constant(vector(I32, lanes), list(range(first, first + lanes))) for first in (0, lanes))
        total = b.fadd(b.shuffle_vector(total, total, low), b.shuffle_vector(total, total, high))
    return b.extract_element(total, I32(0))


@operation
def compute_gates(b: ir.IRBuilder, gates: Array, write_at: Int, decay_at: Int, rate: Float, bias: Float) -> None:
    """In place, 16 tokens: gates[write_at:] = sigmoid(x), gates[decay_at:] = e**(-rate * softplus(x + bias))."""
    one = constant(F32, ROW, 1.0)
    write = element(b, gates, write_at, _KIND)
    b.store(b.fdiv(one, b.fadd(one, exponential(b, _negated(b, b.load(write, align=4))))), write, align=4)
    place = element(b, gates, decay_at, _KIND)
    x = b.fadd(b.load(place, align=4), splat(b, bias, ROW))
    # softplus(x) = max(x, 0) + log(1 + y), and log(1 + y) = 2 artanh(y / (2 + y)), whose series converges fast for y
    # up to 1: the next term is below 1e-9.
    y = exponential(b, _negated(b, call(b, f"llvm.fabs.v{ROW}f32", _KIND, x)))
    z = b.fdiv(y, b.fadd(constant(F32, ROW, 2.0), y))
    square = b.fmul(z, z)
    series = constant(F32, ROW, 1 / 15)
    for odd in (13, 11, 9, 7, 5, 3, 1):
        series = fma(b, series, square, constant(F32, ROW, 1 / odd))
    logarithm = b.fmul(b.fmul(constant(F32, ROW, 2.0), z), series)
    softplus = b.fadd(call(b, f"llvm.maxnum.v{ROW}f32", _KIND, x, constant(F32, ROW, 0.0)), logarithm)
    b.store(exponential(b, b.fmul(_negated(b, splat(b, rate, ROW)), softplus)), place, align=4)


@operation
def gated_norm_block(
    b: ir.IRBuilder, x: Array, at: Int, scale: Float, weight: Array, weight_at: Int, gate: Array, gate_at: Int,
    out: Array, out_at: Int,
) -> None:  # fmt: skip
    """out[out_at:] = x[at:] * scale * weight[weight_at:] * silu(gate[gate_at:]), 16 float32."""
    value, factor, z = (
        b.load(element(b, array, place, _KIND), align=4)
        for array, place in ((x, at), (weight, weight_at), (gate, gate_at))
    )
    normed = b.fmul(b.fmul(value, splat(b, scale, ROW)), factor)
    b.store(b.fmul(normed, _silu(b, z)), element(b, out, out_at, _KIND), align=4)


def _negated(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.fsub(constant(F32, ROW, -0.0), x)


def _silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.fdiv(x, b.fadd(constant(F32, ROW, 1.0), exponential(b, _negated(b, x))))
