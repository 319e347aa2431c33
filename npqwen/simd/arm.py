"""AArch64: NEON with the dot-product extension, every 64-bit Arm core since 2018."""

from __future__ import annotations

from typing import ClassVar

from llvmlite import ir

from npqwen.simd.instructions import F32, I8, I32, NativeHalf, address, call, constant, vector

_WORDS, _BYTES, _FLOATS = vector(I32, 4), vector(I8, 16), vector(F32, 4)
_BIAS = 3 << 22
"""As a float32 (1.5 * 2**23), its last bit counts 1: adding a small integer to its bits adds it to its value."""
_BIAS_BITS = 0x4B400000


class Neon(NativeHalf):
    """`sdot` with a lane index multiplies a quad of 4 rows by 4 of 16 activations held in one register.

    A core of the Cortex-A76 kind has two vector pipes, and only one of them converts, two cycles for a vector: so
    sums start from the bits of a float, and one subtraction, on either pipe, makes them floats.  More vectors in a
    tile than these would be spilled, because LLVM loads ahead.
    """

    name: ClassVar[str] = "neon"
    lanes: ClassVar[int] = 4
    features: ClassVar[frozenset[str]] = frozenset({"dotprod"})
    accumulators: ClassVar[int] = 16
    tiles: ClassVar[dict[int, int]] = {1: 2, 4: 1}

    def int4(self, b: ir.IRBuilder, block: ir.Value) -> list[ir.Value]:
        """The 8 quads, each low one before the high one that is stored with it."""
        quads = []
        for packed in (self.bytes(b, block, quad) for quad in range(4)):
            quads += [b.and_(packed, constant(I8, 16, 15)), b.lshr(packed, constant(I8, 16, 4))]
        return quads

    def dot4(self, b: ir.IRBuilder, quads: list[ir.Value], x: ir.Value, start: ir.Value) -> ir.Value:
        return self._dot(b, quads, x, start, [0, 4, 1, 5, 2, 6, 3, 7])

    def dot8(self, b: ir.IRBuilder, quads: list[ir.Value], x: ir.Value, start: ir.Value) -> ir.Value:
        return self._dot(b, quads, x, start, list(range(8)))

    def _dot(
        self, b: ir.IRBuilder, quads: list[ir.Value], x: ir.Value, start: ir.Value, places: list[int]
    ) -> ir.Value:
        """Multiply each quad by the four activations of its place among the eight."""
        halves = [b.load(address(b, x, at, _WORDS), align=1) for at in (0, 16)]
        total = b.add(start, constant(I32, 4, _BIAS_BITS))
        for quad, place in zip(quads, places, strict=True):
            spread = constant(I32, 4, place % 4)
            lane = b.shuffle_vector(halves[place // 4], ir.Constant(_WORDS, ir.Undefined), spread)
            total = call(
                b, "llvm.aarch64.neon.sdot.v4i32.v16i8", _WORDS, total, quad, b.bitcast(lane, _BYTES)
            )
        return total

    def to_float(self, b: ir.IRBuilder, sums: ir.Value) -> ir.Value:
        return b.fsub(b.bitcast(sums, _FLOATS), constant(F32, 4, float(_BIAS)))
