"""The interface of an instruction set: the width of a vector, and products of small integers.

Weights come in blocks of 16 rows by 32 columns (quant/FORMAT.md). One vector of weights holds `lanes` rows by 4
neighbouring columns, a *quad*, as bytes; a block's 8 quads cover its 32 columns. A product multiplies each quad by the
4 activations of its columns and adds up the 32 products of each row in an int32 lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from llvmlite import ir

from npqwen.format.encodings import Encoding
from npqwen.simd.llvm import CACHE_LINE, F16, F32, I8, I32, constant, offset, splat, vector
from npqwen.simd.packed import start_offset, values_offset

QUADS = 8
"""Quads of a block."""
PREFETCH_DISTANCE = 2048
"""Bytes between weights that are read and those prefetched: further than a processor's own prefetching goes."""

Quads = Iterator[tuple[int, ir.Value]]
"""Quads with their numbers in the block, 0 to 7."""


class InstructionSet:
    """One way to compile the kernels; this base class runs on any processor LLVM knows.

    An encoding of integers needs one method, which unpacks its blocks: `int4_quads` for the encoding named int4. A
    subclass overrides it where its registers want another order.
    """

    name: ClassVar[str] = "portable"
    lanes: ClassVar[int] = 8
    """float32 of a vector."""
    features: ClassVar[frozenset[str]] = frozenset()
    """Processor features, as LLVM names them, without which it cannot run."""
    tiles: ClassVar[dict[int, int]] = {1: 2, 4: 1}
    """Widths of register tiles: tokens that a matrix kernel multiplies at once (ascending, at most four), each with the
    vectors of rows that it multiplies them by; the product, the tile's sums, has to fit the registers."""
    rows: ClassVar[tuple[int, ...]] = (2, 4, 8)
    """Rows of queries that attention multiplies at once: at most four widths, ascending."""
    accumulators: ClassVar[int] = 8
    """Vectors of sums that fit the registers beside what is multiplied."""
    matrices: ClassVar[bool] = False
    """Whether tiles of 16 tokens are multiplied as matrices (npqwen/simd/amx.py)."""
    prefetches: ClassVar[bool] = False
    """Whether `stored_quad` prefetches, where a quad of all 16 rows is one vector and one cache line."""
    pairs: ClassVar[bool] = False
    """Whether `products` of several tokens takes their activations by pairs (npqwen/simd/packed.py)."""

    @classmethod
    def allowed(cls) -> bool:
        """Whether the operating system lets this process use it; requests permission if that is needed."""
        return True

    def zero_point(self, encoding: Encoding) -> int:
        """The integer that `products` adds to each weight; a sum's start subtracts it times the sum of activations."""
        return encoding.zero_point

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, block: ir.Value, x: ir.Value, tokens: int
    ) -> Iterator[ir.Value]:
        """Sums of a block of integer weights times the activations at x (npqwen/simd/packed.py), token after token.

        Each is <lanes x i32> for `to_float`.
        """
        quads = list(self.quads(b, encoding, block))
        return (
            self.dot(b, quads, offset(b, x, values_offset(t), I8), self.start(b, x, t, tokens)) for t in range(tokens)
        )

    def quads(self, b: ir.IRBuilder, encoding: Encoding, block: ir.Value) -> Quads:
        """A block's 8 quads, <4 * lanes x i8>, in the order in which they are read.

        The bytes are integers as stored: unsigned if the encoding has a zero point, else signed.
        """
        quads: Quads = getattr(self, f"{encoding.name}_quads")(b, block)
        return quads

    def int4_quads(self, b: ir.IRBuilder, block: ir.Value) -> Quads:
        """Quad n in the low nibbles, quad n + 4 in the high ones."""
        for n in range(4):
            stored = self.stored_quad(b, block, n)
            yield n, b.and_(stored, constant(I8, 4 * self.lanes, 15))
            yield n + 4, b.lshr(stored, constant(I8, 4 * self.lanes, 4))

    def int8_quads(self, b: ir.IRBuilder, block: ir.Value) -> Quads:
        """Quad n is stored quad n."""
        for n in range(QUADS):
            yield n, self.stored_quad(b, block, n)

    def stored_quad(self, b: ir.IRBuilder, block: ir.Value, n: int) -> ir.Value:
        """The n-th 4 bytes of each of `lanes` rows, <4 * lanes x i8>."""
        return b.load(offset(b, block, CACHE_LINE * n, vector(I8, 4 * self.lanes)), align=1)

    def dot(self, b: ir.IRBuilder, quads: list[tuple[int, ir.Value]], x: ir.Value, start: ir.Value) -> ir.Value:
        """start + quads @ x, <lanes x i32> for `to_float`; x points at 32 int8, -127 to 127."""
        total = start
        for n, quad in quads:
            words = b.bitcast(quad, vector(I32, self.lanes))
            for k in range(4):
                # Byte k of each word, sign-extended.
                column = b.ashr(b.shl(words, constant(I32, self.lanes, 24 - 8 * k)), constant(I32, self.lanes, 24))
                value = b.sext(b.load(offset(b, x, 4 * n + k, I8), align=1), I32)
                total = b.add(total, b.mul(column, splat(b, value, self.lanes)))
        return total

    def start(self, b: ir.IRBuilder, x: ir.Value, token: int, tokens: int) -> ir.Value:
        """The initial value of a token's sums (npqwen/simd/packed.py), in every lane: <lanes x i32>."""
        return splat(b, b.load(offset(b, x, start_offset(token, tokens), I32), align=4), self.lanes)

    def broadcast(self, b: ir.IRBuilder, x: ir.Value, token: int, quad: int) -> ir.Value:
        """A token's 4 activations of a quad, repeated for every row: <lanes x i32>."""
        return splat(b, b.load(offset(b, x, values_offset(token) + 4 * quad, I32), align=1), self.lanes)

    def to_float(self, b: ir.IRBuilder, sums: ir.Value) -> ir.Value:
        """Sums of `products`, as <lanes x float>."""
        return b.sitofp(sums, vector(F32, self.lanes))

    def from_half(self, b: ir.IRBuilder, half: ir.Value) -> ir.Value:
        """<n x i16> holding finite float16 as <n x float>."""
        n = half.type.count
        bits = b.zext(half, vector(I32, n))
        magnitude = b.shl(b.and_(bits, constant(I32, n, 0x7FFF)), constant(I32, n, 13))
        # Multiplying corrects the exponent's bias, subnormal numbers included.
        scaled = b.fmul(b.bitcast(magnitude, vector(F32, n)), constant(F32, n, 2.0**112))
        sign = b.shl(b.and_(bits, constant(I32, n, 0x8000)), constant(I32, n, 16))
        return b.bitcast(b.or_(b.bitcast(scaled, vector(I32, n)), sign), vector(F32, n))


class NativeHalf(InstructionSet):
    """An instruction set with an instruction that converts float16."""

    def from_half(self, b: ir.IRBuilder, half: ir.Value) -> ir.Value:
        n = half.type.count
        return b.fpext(b.bitcast(half, vector(F16, n)), vector(F32, n))
