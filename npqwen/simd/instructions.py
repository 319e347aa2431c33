"""What a kernel needs from an instruction set: a width, and products of small integers.

Weights come in blocks of 16 rows by 32 columns (quant/FORMAT.md).  One vector of weights holds `lanes` rows by
4 neighbouring columns, a *quad*, as bytes; a block's 8 quads cover its 32 columns.  A product multiplies
each quad by the 4 activations of its columns and adds up the 32 products of each row in an int32 lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from llvmlite import ir

from npqwen.format.encodings import Encoding

I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
HALF = ir.HalfType()


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """The LLVM vector type."""
    return ir.VectorType(element, lanes)


def constant(element: ir.Type, lanes: int, value: float) -> ir.Constant:
    """A vector of one value."""
    return ir.Constant(vector(element, lanes), [ir.Constant(element, value)] * lanes)


def splat(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar in every lane."""
    kind = vector(value.type, lanes)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), constant(I32, lanes, 0))


def call(b: ir.IRBuilder, name: str, returns: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(returns, [a.type for a in args])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, args)


def address(b: ir.IRBuilder, base: ir.Value, count: int, to: ir.Type) -> ir.Value:
    """The address `count` bytes past base, as a pointer to `to`."""
    byte = b.bitcast(base, I8.as_pointer())
    return b.bitcast(b.gep(byte, [ir.IntType(64)(count)]), to.as_pointer())


CACHE_LINE = 64
"""Bytes that memory gives at once."""
AHEAD = 2048
"""Bytes between what is read and what is asked for: further than a processor's own prefetching goes."""


def prefetch_line(b: ir.IRBuilder, place: ir.Value) -> None:
    """Ask for the line at an address, a pointer to I8, to be kept in the nearest cache; it need not exist."""
    kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
    function = b.module.globals.get("llvm.prefetch.p0") or ir.Function(b.module, kind, "llvm.prefetch.p0")
    b.call(function, [place, I32(0), I32(3), I32(1)])


class InstructionSet:
    """One way to compile the kernels; this base class runs on any processor LLVM knows.

    `tiles` maps the numbers of tokens (ascending, at most four) that a matrix kernel multiplies at once to the
    number of vectors of rows it multiplies them with; accumulators are their product, and have to fit the registers.
    """

    name: ClassVar[str] = "portable"
    lanes: ClassVar[int] = 8
    features: ClassVar[frozenset[str]] = frozenset()
    tiles: ClassVar[dict[int, int]] = {1: 2, 4: 1}
    rows: ClassVar[tuple[int, ...]] = (2, 4, 8)
    """Rows of queries that attention multiplies at once: at most four widths, ascending."""
    accumulators: ClassVar[int] = 8
    """Vectors of sums that fit the registers beside what is multiplied."""
    matrices: ClassVar[bool] = False
    """Whether tiles of 16 tokens are multiplied as matrices (simd/amx.py)."""
    asks: ClassVar[bool] = False
    """Whether a quad's line is asked for, ahead, as it is read: where its rows are one vector."""
    pairs: ClassVar[bool] = False
    """Whether `products` of several tokens takes their activations by pairs (kernels/packing.py)."""

    @classmethod
    def allowed(cls) -> bool:
        """Whether the operating system lets this process use what the processor has; asks it for that."""
        return True

    def zero_point(self, encoding: Encoding) -> int:
        """What `products` adds to each weight: sums start from minus it times the sum of a token's activations."""
        return encoding.zero_point

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, block: ir.Value, x: ir.Value, tokens: int
    ) -> Iterator[ir.Value]:
        """For each token in turn the sums, <lanes x i32> for `to_float`, of a block of weights by its activations.

        block: the block's weights, of an integer encoding.  x: the activations of the block's columns, then scales,
        then what each token's sums start from (kernels/packing.py).
        """
        quads = list(self.quads(b, encoding, block))
        return (self.dot(b, quads, address(b, x, 32 * t, I8), self.start(b, x, t, tokens)) for t in range(tokens))

    def start(self, b: ir.IRBuilder, x: ir.Value, t: int, tokens: int) -> ir.Value:
        """What token t's sums start from, in every lane."""
        return splat(b, b.load(address(b, x, 36 * tokens + 4 * t, I32), align=4), self.lanes)

    def quads(self, b: ir.IRBuilder, encoding: Encoding, block: ir.Value) -> Iterator[tuple[int, ir.Value]]:
        """A block's 8 quads, <4 * lanes x i8>, each with its number: what the method named after the encoding yields.

        Their bytes are the stored integers: unsigned if the encoding has a zero point, else signed.
        """
        quads: Iterator[tuple[int, ir.Value]] = getattr(self, f"{encoding.name}_quads")(b, block)
        return quads

    def int4_quads(self, b: ir.IRBuilder, block: ir.Value) -> Iterator[tuple[int, ir.Value]]:
        """Low nibbles, then high nibbles of the same bytes."""
        for n in range(4):
            stored = self.stored_quad(b, block, n)
            yield n, b.and_(stored, constant(I8, 4 * self.lanes, 15))
            yield n + 4, b.lshr(stored, constant(I8, 4 * self.lanes, 4))

    def int8_quads(self, b: ir.IRBuilder, block: ir.Value) -> Iterator[tuple[int, ir.Value]]:
        """Bytes as they are stored."""
        for n in range(8):
            yield n, self.stored_quad(b, block, n)

    def stored_quad(self, b: ir.IRBuilder, block: ir.Value, n: int) -> ir.Value:
        """The n-th 4 bytes of each of `lanes` rows, <4 * lanes x i8>."""
        kind = vector(I8, 4 * self.lanes)
        return b.load(address(b, block, 64 * n, kind), align=1)

    def dot(self, b: ir.IRBuilder, quads: list[tuple[int, ir.Value]], x: ir.Value, start: ir.Value) -> ir.Value:
        """start + quads @ x, <lanes x i32> for `to_float`; x points at 32 int8, -127 to 127."""
        wide = vector(I32, self.lanes)
        total = start
        for i, quad in quads:
            words = b.bitcast(quad, wide)
            for k in range(4):
                up = b.shl(words, constant(I32, self.lanes, 24 - 8 * k))
                column = b.ashr(up, constant(I32, self.lanes, 24))
                value = b.sext(b.load(address(b, x, 4 * i + k, I8), align=1), I32)
                total = b.add(total, b.mul(column, splat(b, value, self.lanes)))
        return total

    def to_float(self, b: ir.IRBuilder, sums: ir.Value) -> ir.Value:
        """Sums of `products`, as <lanes x float>."""
        return b.sitofp(sums, vector(F32, self.lanes))

    def from_half(self, b: ir.IRBuilder, half: ir.Value) -> ir.Value:
        """<n x i16> holding finite f16 to <n x float>."""
        n = half.type.count
        bits = b.zext(half, vector(I32, n))
        magnitude = b.shl(b.and_(bits, constant(I32, n, 0x7FFF)), constant(I32, n, 13))
        scaled = b.fmul(b.bitcast(magnitude, vector(F32, n)), constant(F32, n, 2.0**112))
        sign = b.shl(b.and_(bits, constant(I32, n, 0x8000)), constant(I32, n, 16))
        return b.bitcast(b.or_(b.bitcast(scaled, vector(I32, n)), sign), vector(F32, n))

    def broadcast(self, b: ir.IRBuilder, x: ir.Value, quad: int) -> ir.Value:
        """The 4 activations of a quad, repeated for every row: <lanes x i32>."""
        return splat(b, b.load(address(b, x, 4 * quad, I32), align=1), self.lanes)


class NativeHalf(InstructionSet):
    """An instruction set that converts f16 by itself."""

    def from_half(self, b: ir.IRBuilder, half: ir.Value) -> ir.Value:
        n = half.type.count
        return b.fpext(b.bitcast(half, vector(HALF, n)), vector(F32, n))
