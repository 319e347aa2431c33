"""The interface of an instruction set: the width of a vector, and products of small integers.

Weights come in blocks of 16 rows by 32 columns (quant/FORMAT.md). One vector of weights holds `lanes` rows by 4
neighbouring columns, a *quad*, as bytes; a block's 8 quads cover its 32 columns. A product multiplies each quad by the
4 activations of its columns and adds up the 32 products of each row in an int32 lane. Blocks are stored in lines of 64
bytes, in which a quad is one or more bit fields: `quads` unpacks them for any integer encoding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from llvmlite import ir
from numba.core.registry import cpu_target

from npqwen.format.encodings import QUADS as QUADS
from npqwen.format.encodings import ZERO_POINT, Encoding
from npqwen.simd.llvm import CACHE_LINE, F16, F32, I8, I32, call, constant, offset, splat, undefined, vector
from npqwen.simd.packed import scale_offset, start_offset, values_offset

_CPU = cpu_target.target_context.codegen().magic_tuple()[1]
PREFETCH_DISTANCE = 8192 if _CPU.startswith("znver") else 2048
"""Bytes between weights that are read and those prefetched: further ahead than hardware prefetchers reach. Measured on
AMD's Zen 5 and on Intel's Sapphire Rapids (docs/lab.md)."""


@dataclass(frozen=True)
class _Unpacked(Encoding):
    """Unpacked weights of fewer than 8 bits: a byte each, the value plus the zero point."""

    @property
    def zero_point(self) -> int:
        return ZERO_POINT


UNPACKED = _Unpacked("unpacked", code=-1, planes=(8,))
"""How kernels keep weights that they unpack once for many tokens. Not an encoding of files."""

Quads = Iterator[tuple[int, list[ir.Value]]]
"""Numbers in a block, 0 to 7, each with the quads of this number of all blocks."""
Field = tuple[ir.Value, int, int]
"""A bit field of a quad in a line: the line, the field's first bit in each byte, its number of bits."""


class InstructionSet:
    """One way to compile the kernels; this base class runs on any processor LLVM knows."""

    name: ClassVar[str] = "portable"
    lanes: ClassVar[int] = 8
    """float32 of a vector."""
    features: ClassVar[frozenset[str]] = frozenset()
    """Processor features, as LLVM names them, without which it cannot run."""
    tiles: ClassVar[dict[int, int]] = {1: 2, 4: 1}
    """Widths of register tiles: tokens that a matrix kernel multiplies at once (ascending, at most four), each with the
    vectors of rows that it multiplies them by; the product of the two, the tile's sums, has to fit in registers."""
    rows: ClassVar[tuple[int, ...]] = (2, 4, 8)
    """Rows of queries that attention multiplies at once: at most four widths, ascending."""
    accumulators: ClassVar[int] = 8
    """Vectors of sums that fit in registers besides the operands."""
    matrices: ClassVar[bool] = False
    """Whether tiles of 16 tokens are multiplied as matrices (npqwen/simd/amx.py)."""
    prompt_width: ClassVar[int] = 0
    """The width of the tiles in passes over long parts of prompts, multiplied in bf16 (npqwen/simd/amx_bf16.py).
    0: they are multiplied like all others."""
    distance: int = PREFETCH_DISTANCE
    """Bytes by which `line` prefetches ahead, if it does; 0: not at all."""
    prefetches: ClassVar[bool] = False
    """Whether `line` prefetches, where a line is one vector and one cache line."""
    unpack_from: ClassVar[int] = 32
    """Fewest tiles of the widest width for which weights are unpacked once for all of them
    (npqwen/kernels/unpacked_matmul.py), in a step that overlaps with no products; 0: never."""
    panels_width: ClassVar[int] = 0
    """The width of the tiles, of 16 rows, for more tokens than the middle width: weights below 8 bits are unpacked once
    for all of these tiles, a few units of a row group at a time (npqwen/kernels/unpacked_matmul.py); other weights use
    such tiles where they save padding. 0: none."""
    unpacked_vectors: ClassVar[int] = 1
    """Vectors of rows of a tile of the widest width whose weights are unpacked already."""
    start_bytes: ClassVar[int] = 4
    """Bytes of the result of `pack_start`."""
    pairs: ClassVar[bool] = False
    """Whether `products` of several tokens takes their activations by pairs (npqwen/simd/packed.py)."""

    @classmethod
    def allowed(cls) -> bool:
        """Whether the operating system lets this process use it; requests permission if that is needed."""
        return True

    def zero_point(self, encoding: Encoding) -> int:
        """The integer that `products` adds to each value; a sum's start subtracts it times the sum of activations."""
        return encoding.zero_point

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        """Sums of blocks of integer weights times the activations at x (npqwen/simd/packed.py).

        table: from `codebook`, not used if the encoding has none. blocks: one for each vector of rows of the tile.
        Returns, for each token, the sums of each block's rows, <lanes x i32> for `to_float`.
        """
        sums = [[self.start(b, x, t, tokens) for _ in blocks] for t in range(tokens)]
        for n, quads in self.quads(b, encoding, table, blocks):
            for t in range(tokens):
                sums[t] = [self.dot(b, total, quad, x, t, n) for total, quad in zip(sums[t], quads, strict=True)]
        yield from sums

    def scaled_products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], scales: list[ir.Value],
        x: ir.Value, tokens: int,
    ) -> Iterator[list[ir.Value]]:  # fmt: skip
        """`products` times the blocks' scales, <lanes x float>, rounded once.

        scales: for each of the blocks, where the int8 scales of its rows are. Below 8 bits the results are exact: a sum
        of 32 products is at most 32 * 32 * 127 in magnitude, and 128 times that is less than 2**24.
        """
        factors = [self.block_scales(b, place) for place in scales]
        for sums in self.products(b, encoding, table, blocks, x, tokens):
            yield [b.fmul(self.to_float(b, total), factor) for total, factor in zip(sums, factors, strict=True)]

    def block_scales(self, b: ir.IRBuilder, place: ir.Value) -> ir.Value:
        """A block's int8 scales of `lanes` rows, <lanes x float>."""
        scales = b.load(b.bitcast(place, vector(I8, self.lanes).as_pointer()), align=1)
        return b.sitofp(b.sext(scales, vector(I32, self.lanes)), vector(F32, self.lanes))

    def activation_scale(self, b: ir.IRBuilder, x: ir.Value, token: int, tokens: int) -> ir.Value:
        """A token's scale (npqwen/simd/packed.py), <lanes x float>."""
        return splat(b, b.load(offset(b, x, scale_offset(token, tokens), F32), align=4), self.lanes)

    def codebook(self, b: ir.IRBuilder, encoding: Encoding, place: ir.Value) -> ir.Value:
        """The table in which `quads` looks up integers, <4 * lanes x i8>: the codebook at `place`, or zeros if none."""
        kind = vector(I8, 4 * self.lanes)
        return b.load(b.bitcast(place, kind.as_pointer()), align=1) if encoding.codebook else ir.Constant(kind, None)

    def quads(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value]) -> Quads:
        """The 8 quads of each block, <4 * lanes x i8>, in the order in which they are read.

        The bytes are values plus the encoding's zero point, or signed values if that is 0.
        """
        starts = [sum(encoding.planes[:i]) for i in range(len(encoding.planes))]
        lines: dict[int, list[ir.Value]] = {}

        def fields(plane: int, n: int) -> list[Field]:
            """A plane's bits of quad n, in each block."""
            p = encoding.planes[plane]
            number = starts[plane] + n % p
            if number not in lines:
                lines[number] = [self.line(b, block, number) for block in blocks]
            return [(line, n // p * p, p) for line in lines[number]]

        if self.prefetches:  # in the order of their addresses
            for number in range(encoding.bits):
                lines[number] = [self.line(b, block, number) for block in blocks]
        for n in self.order(encoding):
            planes = [fields(plane, n) for plane in range(len(encoding.planes))]
            yield n, [self.quad(b, encoding, table, list(parts)) for parts in zip(*planes, strict=True)]

    def order(self, encoding: Encoding) -> list[int]:
        """The order in which `quads` reads: line by line of the first plane."""
        first = encoding.planes[0]
        return [line + first * f for line in range(first) for f in range(QUADS // first)]

    def unpacked(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, block: ir.Value) -> list[ir.Value]:
        """The lines of a block as UNPACKED: 8 of <4 * lanes x i8>."""
        quads = {n: quad for n, (quad,) in self.quads(b, encoding, table, [block])}
        return [quads[n] for n in range(QUADS)]

    def quad(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, fields: list[Field]) -> ir.Value:
        """One quad of `quads`, assembled from its fields, those of the lowest bits first."""
        if encoding.bits == 8:
            return fields[0][0]
        at = 0 if encoding.codebook else encoding.step.bit_length() - 1
        parts = []
        for line, shift, width in fields:
            mask = constant(I8, line.type.count, (1 << width) - 1 << at)
            parts.append(b.and_(shifted(b, line, at - shift), mask))
            at += width
        bits = functools.reduce(b.or_, parts)
        return self.lookup(b, table, bits) if encoding.codebook else bits

    def lookup(self, b: ir.IRBuilder, table: ir.Value, indices: ir.Value) -> ir.Value:
        """table[i] for each byte i of indices, 0 to 15."""
        found = undefined(indices.type)
        for lane in map(I32, range(indices.type.count)):
            index = b.zext(b.extract_element(indices, lane), I32)
            found = b.insert_element(found, b.extract_element(table, index), lane)
        return found

    def line(self, b: ir.IRBuilder, block: ir.Value, n: int) -> ir.Value:
        """The bytes of `lanes` rows in the n-th line, <4 * lanes x i8>."""
        return b.load(offset(b, block, CACHE_LINE * n, vector(I8, 4 * self.lanes)), align=1)

    def dot(self, b: ir.IRBuilder, total: ir.Value, quad: ir.Value, x: ir.Value, token: int, n: int) -> ir.Value:
        """total + the n-th quad @ a token's activations, -127 to 127, at x: <lanes x i32>."""
        words = b.bitcast(quad, vector(I32, self.lanes))
        for k in range(4):
            column = b.ashr(b.shl(words, constant(I32, self.lanes, 24 - 8 * k)), constant(I32, self.lanes, 24))
            value = b.sext(b.load(offset(b, x, values_offset(token) + 4 * n + k, I8), align=1), I32)
            total = b.add(total, b.mul(column, splat(b, value, self.lanes)))
        return total

    def dot_weights(self, b: ir.IRBuilder, total: ir.Value, quad: ir.Value, weights: ir.Value) -> ir.Value:
        """total + a quad of signed bytes @ 4 weights from 0 to 127, repeated for every row: <lanes x i32> all three."""
        for k in range(4):
            columns = [
                b.ashr(b.shl(each, constant(I32, self.lanes, 24 - 8 * k)), constant(I32, self.lanes, 24))
                for each in (quad, weights)
            ]
            total = b.add(total, b.mul(*columns))
        return total

    def pack_start(self, b: ir.IRBuilder, activations: ir.Value, zero_point: ir.Value) -> ir.Value:
        """The start (npqwen/simd/packed.py) of a block of a token's activations, <32 x i32>; zero_point: i32."""
        return b.mul(b.neg(zero_point), call(b, "llvm.vector.reduce.add.v32i32", I32, activations))

    def start(self, b: ir.IRBuilder, x: ir.Value, token: int, tokens: int) -> ir.Value:
        """The initial value of a token's sums (npqwen/simd/packed.py), in every lane: <lanes x i32>."""
        return splat(b, b.load(offset(b, x, start_offset(token, tokens, self.start_bytes), I32), align=4), self.lanes)

    def broadcast(self, b: ir.IRBuilder, x: ir.Value, token: int, quad: int) -> ir.Value:
        """A token's 4 activations of a quad, repeated for every row: <lanes x i32>."""
        return splat(b, b.load(offset(b, x, values_offset(token) + 4 * quad, I32), align=1), self.lanes)

    def to_float(self, b: ir.IRBuilder, sums: ir.Value) -> ir.Value:
        """Sums of `products`, as <lanes x float>."""
        return b.sitofp(sums, vector(F32, self.lanes))

    def bfloat_pairs(self, b: ir.IRBuilder, even: ir.Value, odd: ir.Value) -> ir.Value:
        """Two vectors of finite float32, rounded to bf16 with ties to even, as <lanes x i32>: `even` in the low halves.
        """
        words, half, one = vector(I32, self.lanes), constant(I32, self.lanes, 16), constant(I32, self.lanes, 1)
        low, high = (
            b.add(b.add(bits, constant(I32, self.lanes, 0x7FFF)), b.and_(b.lshr(bits, half), one))
            for bits in (b.bitcast(even, words), b.bitcast(odd, words))
        )
        return b.or_(b.lshr(low, half), b.and_(high, constant(I32, self.lanes, 0xFFFF0000)))

    def from_half(self, b: ir.IRBuilder, half: ir.Value) -> ir.Value:
        """<n x i16> holding finite float16 as <n x float>."""
        n = half.type.count
        bits = b.zext(half, vector(I32, n))
        magnitude = b.shl(b.and_(bits, constant(I32, n, 0x7FFF)), constant(I32, n, 13))
        # Multiplying corrects the exponent's bias, subnormal numbers included.
        scaled = b.fmul(b.bitcast(magnitude, vector(F32, n)), constant(F32, n, 2.0**112))
        sign = b.shl(b.and_(bits, constant(I32, n, 0x8000)), constant(I32, n, 16))
        return b.bitcast(b.or_(b.bitcast(scaled, vector(I32, n)), sign), vector(F32, n))


def shifted(b: ir.IRBuilder, line: ir.Value, bits: int) -> ir.Value:
    """Every byte shifted left by `bits`, or right by -bits if it is negative."""
    count = constant(I8, line.type.count, abs(bits))
    return b.shl(line, count) if bits > 0 else b.lshr(line, count) if bits else line


class NativeHalf(InstructionSet):
    """An instruction set with an instruction that converts float16."""

    def from_half(self, b: ir.IRBuilder, half: ir.Value) -> ir.Value:
        n = half.type.count
        return b.fpext(b.bitcast(half, vector(F16, n)), vector(F32, n))
