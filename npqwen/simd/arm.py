"""AArch64: NEON with the dot product, every 64-bit Arm core since 2018, and with products of small matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from llvmlite import ir

from npqwen.format.encodings import Encoding
from npqwen.simd.instructions import QUADS, UNPACKED, NativeHalf
from npqwen.simd.llvm import F32, I8, I32, I64, call, constant, offset, settle, undefined, vector
from npqwen.simd.packed import OCTET, scale_offset, start_offset, values_offset

_BYTES, _WORDS, _LONGS, _FLOATS = vector(I8, 16), vector(I32, 4), vector(I64, 2), vector(F32, 4)
_BIAS = 3 << 22
"""As a float32 (1.5 * 2**23), its last bit counts 1: adding a small integer to its bits adds it to its value."""
_BIAS_BITS = 0x4B400000


class Neon(NativeHalf):
    """`sdot` with a lane index multiplies a quad of 4 rows by 4 of 16 activations held in one register.

    A core of the Cortex-A76 kind has two vector pipes, and only one of them converts integers, two cycles a vector: so
    sums start from the bits of a float, and one subtraction, on either pipe, makes them floats. A tile has no more
    vectors than these because LLVM loads early, and would spill them.
    """

    name: ClassVar[str] = "neon"
    lanes: ClassVar[int] = 4
    features: ClassVar[frozenset[str]] = frozenset({"dotprod"})
    accumulators: ClassVar[int] = 16
    unpack_from: ClassVar[int] = 4
    tiles: ClassVar[dict[int, int]] = {1: 2, 2: 2, 4: 1}

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        halves = [
            [b.load(offset(b, x, values_offset(t) + at, _WORDS), align=1) for at in (0, 16)] for t in range(tokens)
        ]
        bias = constant(I32, 4, _BIAS_BITS)
        sums = [[b.add(self.start(b, x, t, tokens), bias)] * len(blocks) for t in range(tokens)]
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

    def dot_weights(self, b: ir.IRBuilder, total: ir.Value, quad: ir.Value, weights: ir.Value) -> ir.Value:
        columns = (b.bitcast(each, _BYTES) for each in (quad, weights))
        return call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", _WORDS, total, *columns)

    def activation_scale(self, b: ir.IRBuilder, x: ir.Value, token: int, tokens: int) -> ir.Value:
        if tokens < self.lanes:
            return super().activation_scale(b, x, token, tokens)
        # A multiply-add takes a lane of four tokens' scales.
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
    makes 2 rows x 8 columns (an *octet*) of 4 x 4 twice; for int4 before the nibbles are taken apart. The four sums of
    an instruction are those of two rows and two tokens: four rows of a token are put together again once a block.
    """

    name: ClassVar[str] = "i8mm"
    features: ClassVar[frozenset[str]] = frozenset({"dotprod", "i8mm"})
    tiles: ClassVar[dict[int, int]] = {1: 2, 2: 2, 4: 1, 8: 1}
    pairs: ClassVar[bool] = True

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        if tokens == 1:  # half of each instruction would be wasted
            return super().products(b, encoding, table, blocks, x, tokens)
        by_block = [
            self._products_of_pairs(b, self.octets(b, encoding, table, block), x, tokens) for block in blocks
        ]
        return map(list, zip(*by_block, strict=True))

    def _products_of_pairs(
        self, b: ir.IRBuilder, octets: list[list[ir.Value]], x: ir.Value, tokens: int
    ) -> Iterator[ir.Value]:
        for t in range(0, tokens, 2):
            starts = b.load(offset(b, x, start_offset(t, tokens, self.start_bytes), vector(I32, 2)), align=4)
            twice = b.shuffle_vector(starts, undefined(starts.type), ir.Constant(_WORDS, [0, 0, 1, 1]))
            start = b.add(twice, constant(I32, 4, _BIAS_BITS))
            pairs = [b.load(offset(b, x, values_offset(t) + 2 * OCTET * n, _BYTES), align=1) for n in range(4)]
            sums = [start, start]
            for pair, halves in zip(pairs, octets, strict=True):
                for half, octet in enumerate(halves):
                    sums[half] = call(b, "llvm.aarch64.neon.smmla.v4i32.v16i8", _WORDS, sums[half], pair, octet)
            for high in (False, True):
                yield b.bitcast(_interleave(b, sums[0], sums[1], _LONGS, high), _WORDS)

    def unpacked(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, block: ir.Value) -> list[ir.Value]:
        return [octet for halves in self.octets(b, encoding, table, block) for octet in halves]

    def octets(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, block: ir.Value
    ) -> list[list[ir.Value]]:
        """For each 8 columns of the block the octet of rows 0 and 1, and that of rows 2 and 3."""
        if encoding is UNPACKED:
            lines = [self.line(b, block, n) for n in range(QUADS)]
            return [list(pair) for pair in zip(lines[::2], lines[1::2], strict=True)]
        width = encoding.planes[0]
        if width % 2 or len(encoding.planes) > 1:
            quads = {n: quad for n, (quad,) in self.quads(b, encoding, table, [block])}
            return _octets(b, [quads[n] for n in range(QUADS)])
        # Interleaved while quads share their bytes, which saves work.
        lines = _octets(b, [self.line(b, block, n) for n in range(width)])
        return [
            [self.quad(b, encoding, table, [(line, shift, width)]) for line in halves]
            for shift in range(0, 8, width)
            for halves in lines
        ]


def _octets(b: ir.IRBuilder, quads: list[ir.Value]) -> list[list[ir.Value]]:
    """Neighbouring quads, two at a time, as two octets."""
    return [
        [b.bitcast(_interleave(b, first, second, _WORDS, high), _BYTES) for high in (False, True)]
        for first, second in zip(quads[::2], quads[1::2], strict=True)
    ]


def _interleave(b: ir.IRBuilder, x: ir.Value, y: ir.Value, kind: ir.VectorType, high: bool) -> ir.Value:
    """Items of x and y, as vectors of this kind, in turn: from their lower halves (`zip1`) or their higher (`zip2`)."""
    n = kind.count
    first = n // 2 if high else 0
    order = [item for i in range(first, first + n // 2) for item in (i, n + i)]
    return b.shuffle_vector(b.bitcast(x, kind), b.bitcast(y, kind), ir.Constant(vector(I32, n), order))
