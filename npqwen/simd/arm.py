"""AArch64: NEON with the dot product (Cortex-A76, Apple M1, Graviton2, later ones), or products of small matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from llvmlite import ir

from npqwen.format.encodings import Encoding
from npqwen.simd.instructions import QUADS, UNPACKED, Field, NativeHalf, shifted
from npqwen.simd.llvm import F32, I8, I32, I64, call, constant, offset, settle, splat, undefined, vector
from npqwen.simd.packed import OCTET, scale_offset, start_offset, values_offset

_BYTES, _WORDS, _LONGS, _FLOATS = vector(I8, 16), vector(I32, 4), vector(I64, 2), vector(F32, 4)
_BIAS = 3 << 22
"""The last bit of this float32 (1.5 * 2**23) counts 1: adding a small integer to its bits adds it to its value."""
_BIAS_BITS = 0x4B400000


Octets = Iterator[tuple[int, list[ir.Value]]]
"""Numbers in a block, 0 to 3, each with the 8 columns of rows 0 and 1, and of rows 2 and 3."""


class Neon(NativeHalf):
    """`sdot` with a lane index multiplies a quad of 4 rows by 4 of 16 activations held in one register.

    A core of the Cortex-A76 kind has two vector pipes, and only one of them converts integers, two cycles a vector: so
    sums start from the bits of a float, and one subtraction, on either pipe, makes them floats. Packed activations have
    such starts, one for each row of a vector. Tiles have no more vectors because LLVM hoists loads, and would spill
    registers.
    """

    name: ClassVar[str] = "neon"
    lanes: ClassVar[int] = 4
    features: ClassVar[frozenset[str]] = frozenset({"dotprod"})
    accumulators: ClassVar[int] = 16
    unpack_from: ClassVar[int] = 4
    tiles: ClassVar[dict[int, int]] = {1: 2, 2: 2, 4: 1}
    start_bytes: ClassVar[int] = 16

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        halves = [
            [b.load(offset(b, x, values_offset(t) + at, _WORDS), align=1) for at in (0, 16)] for t in range(tokens)
        ]
        sums = [[self.start(b, x, t, tokens)] * len(blocks) for t in range(tokens)]
        for n, quads in self.quads(b, encoding, table, blocks):
            for t in range(tokens):
                lane = b.shuffle_vector(halves[t][n // 4], undefined(_WORDS), constant(I32, 4, n % 4))
                values = b.bitcast(lane, _BYTES)
                sums[t] = [
                    call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", _WORDS, total, quad, values)
                    for total, quad in zip(sums[t], quads, strict=True)
                ]
            if n >= QUADS // 2:
                # The last quad of a line, or the last but one: more lines at a time would not fit the registers.
                settled = iter(settle(b, "w", [total for totals in sums for total in totals]))
                sums = [[next(settled) for _ in blocks] for _ in range(tokens)]
        yield from sums

    def quad(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, fields: list[Field]) -> ir.Value:
        """One quad. Where its bits lie in two planes, an insert joins them, and overwrites bits of other quads.

        That takes two to four instructions, instead of four or five with a mask for each of the fields.
        """
        if len(fields) == 1:
            return super().quad(b, encoding, table, fields)
        (low, shift, width), (high, high_shift, high_width) = fields
        at = 0 if encoding.codebook else encoding.step.bit_length() - 1
        top = at + width
        end = top + high_width
        clean = high_shift + high_width == 8  # a shift to the right leaves nothing above the high field
        if shift + width == 8:
            joined, clean = shifted(b, high, top - high_shift), clean and high_shift > top
            if not at and not clean:  # this mask copies the line, too, if it is not shifted
                joined, clean = b.and_(joined, constant(I8, 16, (1 << end) - (1 << top))), True
            joined = _insert(b, "sri", joined, low, 8 - top)
        else:
            joined = _insert(b, "sli", shifted(b, low, at - shift), shifted(b, high, -high_shift), top)
        if at or not clean:
            joined = b.and_(joined, constant(I8, 16, (1 << end) - (1 << at)))
        return self.lookup(b, table, joined) if encoding.codebook else joined

    def pack_start(self, b: ir.IRBuilder, activations: ir.Value, zero_point: ir.Value) -> ir.Value:
        # As bits of a float, and repeated for the rows of a vector, which would take the vector pipes' time later.
        return splat(b, b.add(super().pack_start(b, activations, zero_point), I32(_BIAS_BITS)), self.start_bytes // 4)

    def start(self, b: ir.IRBuilder, x: ir.Value, token: int, tokens: int) -> ir.Value:
        return b.load(offset(b, x, start_offset(token, tokens, self.start_bytes), _WORDS), align=4)

    def dot_weights(self, b: ir.IRBuilder, total: ir.Value, quad: ir.Value, weights: ir.Value) -> ir.Value:
        columns = (b.bitcast(each, _BYTES) for each in (quad, weights))
        return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", _WORDS, total, *columns)

    def activation_scale(self, b: ir.IRBuilder, x: ir.Value, token: int, tokens: int) -> ir.Value:
        if tokens < self.lanes:
            return super().activation_scale(b, x, token, tokens)
        # A multiply-add can take its factor from one lane of four tokens' scales.
        first = token // self.lanes * self.lanes
        scales = b.load(offset(b, x, scale_offset(first, tokens), _FLOATS), align=4)
        return b.shuffle_vector(scales, undefined(_FLOATS), constant(I32, self.lanes, token % self.lanes))

    def lookup(self, b: ir.IRBuilder, table: ir.Value, indices: ir.Value) -> ir.Value:
        return call(b, "llvm.aarch64.neon.tbl1.v16i8", _BYTES, table, indices)

    def to_float(self, b: ir.IRBuilder, sums: ir.Value) -> ir.Value:
        return b.fsub(b.bitcast(sums, _FLOATS), constant(F32, 4, float(_BIAS)))


class NeonI8mm(Neon):
    """`smmla` multiplies 2 rows x 8 columns by 8 columns of 2 tokens: as much as two `sdot`.

    Apple's M2, Neoverse V1 and N2, Snapdragon X and newer cores have it. The words of two quads are interleaved, which
    turns two quads of 4 x 4 into two *octets* of 2 rows x 8 columns; for int4 before the nibbles are unpacked. The four
    sums of an instruction are those of two rows and two tokens: a token's four rows are reassembled once per block.
    Likewise, packed activations have each token's start twice.
    """

    name: ClassVar[str] = "i8mm"
    features: ClassVar[frozenset[str]] = frozenset({"dotprod", "i8mm"})
    tiles: ClassVar[dict[int, int]] = {1: 2, 2: 2, 4: 1, 8: 1}
    pairs: ClassVar[bool] = True
    start_bytes: ClassVar[int] = 8

    def start(self, b: ir.IRBuilder, x: ir.Value, token: int, tokens: int) -> ir.Value:
        place = offset(b, x, start_offset(token, tokens, self.start_bytes), I32)
        return splat(b, b.load(place, align=4), self.lanes)

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        if tokens == 1:  # half of each instruction would be wasted
            return super().products(b, encoding, table, blocks, x, tokens)
        by_block = [self._products_of_pairs(b, self.octets(b, encoding, table, block), x, tokens) for block in blocks]
        return map(list, zip(*by_block, strict=True))

    def _products_of_pairs(self, b: ir.IRBuilder, octets: Octets, x: ir.Value, tokens: int) -> Iterator[ir.Value]:
        pairs = range(0, tokens, 2)
        starts = [offset(b, x, start_offset(t, tokens, self.start_bytes), _WORDS) for t in pairs]
        sums = [[b.load(place, align=4)] * 2 for place in starts]
        for n, halves in octets:
            for t in pairs:
                pair = b.load(offset(b, x, values_offset(t) + 2 * OCTET * n, _BYTES), align=1)
                sums[t // 2] = [
                    call(b, "llvm.aarch64.neon.smmla.v4i32.v16i8", _WORDS, total, pair, octet)
                    for total, octet in zip(sums[t // 2], halves, strict=True)
                ]
            if tokens > 4:  # which leave too few registers for the activations
                settled = iter(settle(b, "w", [total for totals in sums for total in totals]))
                sums = [[next(settled) for _ in totals] for totals in sums]
        for first, second in sums:
            for high in (False, True):
                yield b.bitcast(_interleave(b, first, second, _LONGS, high), _WORDS)

    def unpacked(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, block: ir.Value) -> list[ir.Value]:
        octets = dict(self.octets(b, encoding, table, block))
        return [octet for n in sorted(octets) for octet in octets[n]]

    def octets(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, block: ir.Value) -> Octets:
        """The octets of a block in the order in which they are read."""
        if encoding is UNPACKED:
            for n in range(0, QUADS, 2):
                yield n // 2, [self.line(b, block, n), self.line(b, block, n + 1)]
            return
        width = encoding.planes[0]
        if width % 2 or len(encoding.planes) > 1:
            quads: dict[int, ir.Value] = {}
            for n, (quad,) in self.quads(b, encoding, table, [block]):
                quads[n] = quad
                if n ^ 1 in quads:
                    yield n // 2, _octets(b, quads[n & ~1], quads[n | 1])
            return
        for n in range(0, width, 2):
            # Interleaved while quads share their bytes, which saves work.
            lines = _octets(b, self.line(b, block, n), self.line(b, block, n + 1))
            for shift in range(0, 8, width):
                yield (n + shift) // 2, [self.quad(b, encoding, table, [(line, shift, width)]) for line in lines]


def _insert(b: ir.IRBuilder, name: str, into: ir.Value, bits: ir.Value, count: int) -> ir.Value:
    """`into` with the bits of `bits` inserted in each byte, shifted left ("sli") or right ("sri"); other bits stay."""
    return call(b, f"llvm.aarch64.neon.v{name}.v16i8", _BYTES, into, bits, I32(count))


def _octets(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> list[ir.Value]:
    """Two neighbouring quads as two octets."""
    return [b.bitcast(_interleave(b, first, second, _WORDS, high), _BYTES) for high in (False, True)]


def _interleave(b: ir.IRBuilder, x: ir.Value, y: ir.Value, kind: ir.VectorType, high: bool) -> ir.Value:
    """Alternating items of x and y, as vectors of this kind: of the lower halves (`zip1`) or the higher (`zip2`)."""
    n = kind.count
    first = n // 2 if high else 0
    order = [item for i in range(first, first + n // 2) for item in (i, n + i)]
    return b.shuffle_vector(b.bitcast(x, kind), b.bitcast(y, kind), ir.Constant(vector(I32, n), order))
