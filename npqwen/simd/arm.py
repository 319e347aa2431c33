"""AArch64: NEON with the dot-product extension, every 64-bit Arm core since 2018."""

from __future__ import annotations

from typing import ClassVar

from llvmlite import ir

from npqwen.simd.instructions import I8, I32, NativeHalf, address, call, constant, vector


class Neon(NativeHalf):
    """`sdot` with a lane index multiplies a quad of 4 rows by 4 of 16 activations held in one register."""

    name: ClassVar[str] = "neon"
    lanes: ClassVar[int] = 4
    features: ClassVar[frozenset[str]] = frozenset({"dotprod"})
    accumulators: ClassVar[int] = 16
    tiles: ClassVar[dict[int, int]] = {1: 4, 4: 2}

    def dot8(self, b: ir.IRBuilder, quads: list[ir.Value], x: ir.Value, start: ir.Value) -> ir.Value:
        words, sixteen = vector(I32, 4), vector(I8, 16)
        halves = [b.load(address(b, x, at, words), align=1) for at in (0, 16)]
        total = start
        for i, quad in enumerate(quads):
            half = halves[i // 4]
            lane = b.shuffle_vector(half, ir.Constant(words, ir.Undefined), constant(I32, 4, i % 4))
            total = call(
                b, "llvm.aarch64.neon.sdot.v4i32.v16i8", words, total, quad, b.bitcast(lane, sixteen)
            )
        return total
