"""Register tiles: accumulators in SIMD registers as one Numba value, and the operations that kernels do on them.

A tile is a tuple of `tokens * rows` float32 vectors; vector `t * rows + r` holds, one per lane, the sums of token t and
of weight rows `r * LANES` and up. Several tiles, each of its own group of weight rows, can be one tuple, one tile after
another: more independent sums hide the latency of multiply-adds. Operations unroll when they are compiled: a kernel is
an ordinary loop around a few calls, and LLVM keeps the tiles in registers. Offsets into arrays count elements.
"""

from __future__ import annotations

import functools
from copy import copy
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from npqwen.format.encodings import ENCODINGS, INT8, UNIT_ROWS, Encoding
from npqwen.simd.instructions import PREFETCH_DISTANCE, QUADS, UNPACKED
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import (
    CACHE_LINE,
    F32,
    I8,
    I16,
    I32,
    I64,
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
_CACHED = copy(ISA)
"""For data that the caller prefetches, or has in its cache."""
_CACHED.distance = 0


class Vector(types.Type):
    """A register: `LANES` float32, or 4 * LANES bytes."""

    def __init__(self, name: str, kind: ir.VectorType) -> None:
        self.kind = kind
        super().__init__(name=f"{name}x{kind.count}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """Represented as an LLVM vector."""

    def __init__(self, manager: Any, numba_type: Vector) -> None:
        super().__init__(manager, numba_type, numba_type.kind)


f32s = Vector("f32", FLOATS)
bytes_ = Vector("i8", vector(I8, 4 * LANES))


def chains(vectors: int) -> int:
    """How many tiles of `vectors` vectors keep the processor busy: 1 to 4."""
    return max(1, min(4, ISA.accumulators // vectors))


@operation(returns=lambda tokens, rows, together: types.UniTuple(f32s, tokens * rows * together))
def zeros(b: ir.IRBuilder, tokens: Const, rows: Const, together: Const) -> Tile:
    """`together` tiles of zeros, of `rows` vectors of rows per token."""
    return [constant(F32, LANES, 0.0)] * (tokens * rows * together)


@operation
def add(b: ir.IRBuilder, tile: Tile, other: Tile) -> Tile:
    """tile + other, of the same shape."""
    return [b.fadd(x, y) for x, y in zip(tile, other, strict=True)]


@operation
def load(b: ir.IRBuilder, tile: Tile, array: Array, at: Int, rows: Const, stride: Int) -> Tile:
    """The tile that `store` with the same arguments has written; `tile` only determines the number of its vectors."""
    return [b.load(_place(b, array, at, n, rows, stride), align=4) for n in range(len(tile))]


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
def store_tiles(
    b: ir.IRBuilder, tiles: Tile, together: Const, out: Array, at: Int, pitch: Int, rows: Const, stride: Int
) -> None:
    """`store` each of `together` tiles, `pitch` after the previous one."""
    size = len(tiles) // together
    for n, value in enumerate(tiles):
        b.store(value, _place(b, out, step(b, at, n // size, pitch), n % size, rows, stride), align=4)


@operation
def store_add_tiles(
    b: ir.IRBuilder, tiles: Tile, together: Const, out: Array, at: Int, pitch: Int, rows: Const, stride: Int
) -> None:
    """`store_add` each of `together` tiles, `pitch` after the previous one."""
    size = len(tiles) // together
    for n, value in enumerate(tiles):
        place = _place(b, out, step(b, at, n // size, pitch), n % size, rows, stride)
        b.store(b.fadd(b.load(place, align=4), value), place, align=4)


def _place(b: ir.IRBuilder, out: ir.Value, at: ir.Value, n: int, rows: int, stride: ir.Value) -> ir.Value:
    """Where the n-th vector of a tile belongs."""
    t, r = divmod(n, rows)
    return element(b, out, step(b, step(b, at, t, stride), r * LANES), FLOATS)


@operation(returns=lambda encoding, codebook: types.UniTuple(bytes_, 1))
def load_codebook(b: ir.IRBuilder, encoding: Const, codebook: Array) -> Tile:
    """A matrix's codebook, for `dot_block_int`; encoding: a code. Not read if the encoding has none."""
    return [ISA.codebook(b, ENCODINGS[encoding], codebook)]


@operation
def dot_block_int(
    b: ir.IRBuilder, tile: Tile, tokens: Const, encoding: Const, codebook: Tile,
    w: Array, at: Int, scales_at: Int, x: Array, x_at: Int,
) -> Tile:  # fmt: skip
    """tile + a block of weights @ the tokens' activations, without the rows' scales.

    encoding: the code of an integer encoding. codebook: from `load_codebook`. w: uint8, the block's weights at w[at:],
    their int8 scales at w[scales_at:], both of the tile's first row. x: uint8, the block's activations at x[x_at:]
    (npqwen/simd/packed.py).
    """
    return _add_products(b, tile, tokens, ENCODINGS[encoding], codebook[0], w, at, w, scales_at, x, x_at)


@operation
def dot_block_unpacked(
    b: ir.IRBuilder, tile: Tile, tokens: Const, values: Array, at: Int, w: Array, scales_at: Int, x: Array, x_at: Int
) -> Tile:
    """tile + a block of weights from `unpack_block` @ the tokens' activations, without the rows' scales.

    values: uint8, the unpacked block at values[at:]. The rest is as for `dot_block_int`.
    """
    return _add_products(b, tile, tokens, UNPACKED, None, values, at, w, scales_at, x, x_at)


@operation
def dot_block_int8(
    b: ir.IRBuilder, tile: Tile, tokens: Const, w: Array, at: Int, pitch: Int, x: Array, x_at: Int
) -> Tile:
    """tile + blocks of int8 @ the tokens' activations, without the rows' scales.

    w: uint8, the first 16 rows' block at w[at:], as in the encoding INT8 without scales; the next 16 rows' block is
    `pitch` bytes further. x: uint8, the block's activations at x[x_at:] (npqwen/simd/packed.py).
    """
    rows, lines = len(tile) // tokens, UNIT_ROWS // LANES
    activations = element(b, x, x_at, I8)
    blocks = [
        offset(b, element(b, w, step(b, at, r // lines, pitch), I8), 4 * LANES * (r % lines), I8) for r in range(rows)
    ]
    for t, sums in enumerate(_CACHED.products(b, INT8, None, blocks, activations, tokens)):
        x_scale = splat(b, b.load(offset(b, activations, scale_offset(t, tokens), F32), align=4), LANES)
        for r in range(rows):
            tile[t * rows + r] = fma(b, ISA.to_float(b, sums[r]), x_scale, tile[t * rows + r])
    return tile


@operation
def add_weighted_lines(
    b: ir.IRBuilder, tile: Tile, rows: Const, blocks: Const, values: Array, at: Int, pitch: Int, weights: Array,
    stride: Int, scales: Array,
) -> Tile:  # fmt: skip
    """tile + the weights of `rows` rows @ `blocks` blocks of int8, times the rows' scales.

    values: uint8, a block of 16 coordinates by 32 positions at values[at:], the next block `pitch` bytes further.
    weights: uint8 from 0 to 127, 32 for each block, those of the next row `stride` bytes further. scales: float32
    (rows,).
    """
    vectors = len(tile) // rows
    kind = vector(I32, LANES)
    # Few sums: two chains each, as each addition waits for the previous one.
    chains_ = 2 if len(tile) <= 4 else 1
    sums = [[constant(I32, LANES, 0)] * chains_ for _ in tile]
    for block in range(blocks):
        place = element(b, values, step(b, at, block, pitch), I8)
        for n in range(QUADS):
            lines = [b.bitcast(_CACHED.line(b, offset(b, place, 4 * LANES * r, I8), n), kind) for r in range(vectors)]
            for t in range(rows):
                word = offset(b, element(b, weights, step(b, I64(32 * block + 4 * n), t, stride), I8), 0, I32)
                four = splat(b, b.load(word, align=1), LANES)
                for r, line in enumerate(lines):
                    chain = sums[t * vectors + r]
                    chain[n % chains_] = ISA.dot_weights(b, chain[n % chains_], line, four)
    for t in range(rows):
        scale = splat(b, b.load(element(b, scales, I64(t), F32), align=4), LANES)
        for r in range(vectors):
            total = functools.reduce(b.add, sums[t * vectors + r])
            tile[t * vectors + r] = fma(b, b.sitofp(total, FLOATS), scale, tile[t * vectors + r])
    return tile


@operation
def unpack_block(
    b: ir.IRBuilder, encoding: Const, codebook: Tile, w: Array, at: Int, out: Array, out_at: Int
) -> None:
    """out[out_at:] = the block of weights at uint8 w[at:], unpacked for `dot_block_unpacked`: 512 uint8.

    encoding: the code of an integer encoding of fewer than 8 bits. codebook: from `load_codebook`.
    """
    for row in range(0, 4 * UNIT_ROWS, 4 * LANES):
        block = offset(b, element(b, w, at, I8), row, I8)
        for n, line in enumerate(ISA.unpacked(b, ENCODINGS[encoding], codebook[0], block)):
            b.store(line, offset(b, element(b, out, out_at, I8), CACHE_LINE * n + row, line.type), align=16)


def _add_products(
    b: ir.IRBuilder, tile: list[ir.Value], tokens: int, encoding: Encoding, table: ir.Value | None,
    values: ir.Value, at: ir.Value, w: ir.Value, scales_at: ir.Value, x: ir.Value, x_at: ir.Value,
) -> list[ir.Value]:  # fmt: skip
    """tile + the block of weights at values[at:] @ the tokens' activations, times both blocks' scales."""
    block, scales, activations = element(b, values, at, I8), element(b, w, scales_at, I8), element(b, x, x_at, I8)
    rows = len(tile) // tokens
    blocks = [offset(b, block, 4 * LANES * r, I8) for r in range(rows)]
    places = [offset(b, scales, LANES * r, I8) for r in range(rows)]
    for t, products in enumerate(ISA.scaled_products(b, encoding, table, blocks, places, activations, tokens)):
        x_scale = ISA.activation_scale(b, activations, t, tokens)
        for r, product in enumerate(products):
            tile[t * rows + r] = fma(b, product, x_scale, tile[t * rows + r])
    return tile


@operation
def scale_rows(b: ir.IRBuilder, tile: Tile, rows: Const, w: Array, at: Int) -> Tile:
    """tile * the rows' float32 scales, which begin at the uint8 w[at:]; rows: vectors of rows per token."""
    place = element(b, w, at, I8)
    scales = [b.load(offset(b, place, 4 * LANES * r, FLOATS), align=4) for r in range(rows)]
    return [b.fmul(value, scales[n % rows]) for n, value in enumerate(tile)]


BFLOAT16, FLOAT16, FLOAT32 = range(3)
"""Dtypes of columns of floats; arrays hold the first two as uint16."""


@operation
def multiply_add_column(
    b: ir.IRBuilder, tiles: Tile, tokens: Const, together: Const, dtype: Const,
    w: Array, at: Int, pitch: Int, x: Array, x_at: Int, stride: Int,
) -> Tile:  # fmt: skip
    """Add the outer product of a column of weights with its activations, one per token, to each of `together` tiles.

    The rows of tile n have the weights w[at + n * pitch:], of the dtype BFLOAT16, FLOAT16 or FLOAT32. The activation of
    token t is x[x_at + t * stride], float32, for all tiles.
    """
    rows = len(tiles) // (tokens * together)
    activations = [b.load(element(b, x, step(b, x_at, t, stride), F32), align=4) for t in range(tokens)]
    activations = [splat(b, value, LANES) for value in activations]
    for tile in range(together):
        column = element(b, w, step(b, at, tile, pitch), I8)
        for r in range(rows):
            weights = _load(b, dtype, column, r)
            for t in range(tokens):
                n = (tile * tokens + t) * rows + r
                tiles[n] = fma(b, activations[t], weights, tiles[n])
    return tiles


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
    """Prefetch `size` bytes starting at array[at]; they need not be mapped."""
    place = element(b, array, at, I8)
    for line in range(0, size, CACHE_LINE):
        prefetch_line(b, offset(b, place, line, I8))


@operation
def add_stream(b: ir.IRBuilder, tile: Tile, array: Array, at: Int, count: Const) -> Tile:
    """tile + the `count` float32 array[at:], a vector to each of the tile's in turn, with prefetching."""
    for n in range(count // LANES):
        place = element(b, array, step(b, at, n * LANES), FLOATS)
        if n * LANES * 4 % CACHE_LINE == 0:
            prefetch_line(b, offset(b, place, PREFETCH_DISTANCE, I8))
        tile[n % len(tile)] = b.fadd(tile[n % len(tile)], b.load(place, align=4))
    return tile
