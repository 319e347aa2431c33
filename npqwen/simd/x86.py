"""x86-64: AVX2, and the dot-product instruction `vpdpbusd` in its 256- and 512-bit forms."""

from __future__ import annotations

from typing import ClassVar

from llvmlite import ir

from npqwen.simd.instructions import I8, I16, I32, NativeHalf, call, constant, vector


class Avx2(NativeHalf):
    """`vpmaddubsw` multiplies unsigned by signed bytes and adds pairs in int16."""

    name: ClassVar[str] = "avx2"
    lanes: ClassVar[int] = 8
    features: ClassVar[frozenset[str]] = frozenset({"avx2", "fma", "f16c"})
    tiles: ClassVar[dict[int, int]] = {1: 2, 4: 1}

    def dot4(self, b: ir.IRBuilder, quads: list[ir.Value], x: ir.Value, start: ir.Value) -> ir.Value:
        # 15 * 127 * 2 * 8 = 30480 < 32767: all eight quads add up in int16.
        total = None
        for i, quad in enumerate(quads):
            pairs = self._multiply(b, quad, b.bitcast(self.broadcast(b, x, i), vector(I8, 32)))
            total = pairs if total is None else b.add(total, pairs)
        return b.add(start, self._widen(b, total))

    def dot8(self, b: ir.IRBuilder, quads: list[ir.Value], x: ir.Value, start: ir.Value) -> ir.Value:
        # |w| * (x with w's sign): 127 * 127 * 2 = 32258 < 32767 for one quad only.
        total = start
        for i, quad in enumerate(quads):
            magnitude = call(b, "llvm.x86.avx2.psign.b", quad.type, quad, quad)
            signed = b.bitcast(self.broadcast(b, x, i), vector(I8, 32))
            signed = call(b, "llvm.x86.avx2.psign.b", quad.type, signed, quad)
            total = b.add(total, self._widen(b, self._multiply(b, magnitude, signed)))
        return total

    def _multiply(self, b: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        return call(b, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), unsigned, signed)

    def _widen(self, b: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
        return call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), pairs, constant(I16, 16, 1))


class AvxVnni(NativeHalf):
    """`vpdpbusd` on 256 bits: four unsigned by signed products added to an int32 lane at once."""

    name: ClassVar[str] = "avxvnni"
    lanes: ClassVar[int] = 8
    features: ClassVar[frozenset[str]] = frozenset({"avx2", "fma", "f16c", "avxvnni"})
    int8_zero: ClassVar[int] = 128
    tiles: ClassVar[dict[int, int]] = {1: 2, 4: 1}

    def int8(self, b: ir.IRBuilder, block: ir.Value) -> list[ir.Value]:
        flip = constant(I8, 4 * self.lanes, 0x80)
        return [b.xor(quad, flip) for quad in super().int8(b, block)]

    def dot8(self, b: ir.IRBuilder, quads: list[ir.Value], x: ir.Value, start: ir.Value) -> ir.Value:
        # Two chains: eight dependent instructions would wait for each other.
        kind = vector(I32, self.lanes)
        chains = [start, constant(I32, self.lanes, 0)]
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        for i, quad in enumerate(quads):
            chains[i % 2] = call(
                b, name, kind, chains[i % 2], b.bitcast(quad, kind), self.broadcast(b, x, i)
            )
        return b.add(*chains)


class Avx512(AvxVnni):
    """`vpdpbusd` on 512 bits, and twice the registers."""

    name: ClassVar[str] = "avx512"
    lanes: ClassVar[int] = 16
    features: ClassVar[frozenset[str]] = frozenset(
        {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}
    )
    rows: ClassVar[tuple[int, ...]] = (2, 4, 8, 16)
    accumulators: ClassVar[int] = 16
    tiles: ClassVar[dict[int, int]] = {1: 1, 4: 1, 16: 1}
