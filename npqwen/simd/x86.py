"""x86-64: AVX2, the dot-product instruction `vpdpbusd` in its 256- and 512-bit forms, and byte shuffles."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

from llvmlite import ir

from npqwen.format.encodings import Encoding
from npqwen.simd.instructions import PREFETCH_DISTANCE, Field, NativeHalf, Quads
from npqwen.simd.llvm import CACHE_LINE, I8, I16, I32, call, constant, offset, prefetch_line, vector


class Avx2(NativeHalf):
    """`vpmaddubsw` multiplies unsigned by signed bytes and adds pairs in int16."""

    name: ClassVar[str] = "avx2"
    lanes: ClassVar[int] = 8
    features: ClassVar[frozenset[str]] = frozenset({"avx2", "fma", "f16c"})
    tiles: ClassVar[dict[int, int]] = {1: 2, 4: 1}

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        # Quad after quad, for all tokens each: sixteen registers hold the sums, but not eight quads beside them.
        signed = encoding.zero_point == 0
        # Quads whose pairs of products add up in int16: two below 64, 63 * 127 * 2 * 2 = 32004 < 32767; only one of
        # int8, 127 * 127 * 2 = 32258.
        run = 32767 // (encoding.largest * 127 * 2)
        narrow: list[list[Any]] = [[None] * len(blocks) for _ in range(tokens)]
        totals = [[constant(I32, self.lanes, 0)] * len(blocks) for _ in range(tokens)]
        for step, (n, quads) in enumerate(self.quads(b, encoding, table, blocks)):
            magnitudes = [_with_sign(b, quad, quad) for quad in quads] if signed else quads
            for t in range(tokens):
                activations = b.bitcast(self.broadcast(b, x, t, n), quads[0].type)
                for r, (quad, magnitude) in enumerate(zip(quads, magnitudes, strict=True)):
                    factor = _with_sign(b, activations, quad) if signed else activations
                    pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), magnitude, factor)
                    narrow[t][r] = pairs if step % run == 0 else b.add(narrow[t][r], pairs)
                    if step % run == run - 1:
                        totals[t][r] = b.add(totals[t][r], _widen(b, narrow[t][r]))
        for t in range(tokens):
            start = self.start(b, x, t, tokens)
            yield [b.add(total, start) for total in totals[t]]

    def lookup(self, b: ir.IRBuilder, table: ir.Value, indices: ir.Value) -> ir.Value:
        # Within each 16 bytes, by the low nibbles of bytes whose highest bit is 0.
        return call(b, "llvm.x86.avx2.pshuf.b", indices.type, table, indices)


def _with_sign(b: ir.IRBuilder, x: ir.Value, sign: ir.Value) -> ir.Value:
    """x * sign(sign), byte by byte."""
    return call(b, "llvm.x86.avx2.psign.b", x.type, x, sign)


def _widen(b: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
    """Neighbouring int16 added up in int32."""
    return call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), pairs, constant(I16, 16, 1))


class AvxVnni(Avx2):
    """`vpdpbusd` on 256 bits: four unsigned by signed products added to an int32 lane at once."""

    name: ClassVar[str] = "avxvnni"
    features: ClassVar[frozenset[str]] = frozenset({"avx2", "fma", "f16c", "avxvnni"})

    def zero_point(self, encoding: Encoding) -> int:
        return encoding.zero_point or 128

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        # Independent sums side by side: eight dependent instructions would wait for each other.
        chains, together = (2, 1) if tokens == 1 else (1, 4)
        words, zero, sign = vector(I32, self.lanes), constant(I32, self.lanes, 0), constant(I8, 4 * self.lanes, 0x80)
        unpacked = self.quads(b, encoding, table, blocks)
        quads = list(unpacked) if tokens > together else unpacked
        for first in range(0, tokens, together):
            sums = [
                [self.start(b, x, t, tokens)] * len(blocks) + [zero] * (chains - 1) * len(blocks)
                for t in range(first, first + together)
            ]
            for step, (n, found) in enumerate(quads):
                unsigned = found if encoding.zero_point else [b.xor(quad, sign) for quad in found]
                for t, parts in enumerate(sums, first):
                    for r, quad in enumerate(unsigned, step % chains * len(blocks)):
                        parts[r] = call(
                            b, f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", words,
                            parts[r], b.bitcast(quad, words), self.broadcast(b, x, t, n),
                        )  # fmt: skip
            for parts in sums:
                yield [functools.reduce(b.add, parts[r :: len(blocks)]) for r in range(len(blocks))]


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
    prefetches: ClassVar[bool] = True
    # With wide tiles, unpacking is a small part of the work.
    unpack_from: ClassVar[int] = 0

    def line(self, b: ir.IRBuilder, block: ir.Value, n: int) -> ir.Value:
        prefetch_line(b, offset(b, block, PREFETCH_DISTANCE + CACHE_LINE * n, I8))
        return super().line(b, block, n)

    def quads(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value]) -> Quads:
        # All of them before the products: there are registers, and with one token that is a hundredth faster.
        yield from sorted(super().quads(b, encoding, table, blocks), key=lambda quad: quad[0])

    def lookup(self, b: ir.IRBuilder, table: ir.Value, indices: ir.Value) -> ir.Value:
        return call(b, "llvm.x86.avx512.pshuf.b.512", indices.type, table, indices)


class Avx512Vbmi(Avx512):
    """`vpermb` looks bytes up in 64, and ignores the upper two bits of an index."""

    name: ClassVar[str] = "avx512vbmi"
    features: ClassVar[frozenset[str]] = Avx512.features | {"avx512vbmi"}

    def quad(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, fields: list[Field]) -> ir.Value:
        if not encoding.codebook:
            return super().quad(b, encoding, table, fields)
        # The codebook repeats, so that bits above the index's do not matter: only those of lower planes are masked.
        bits, at = None, 0
        for line, shift, width in fields:
            moved = _shift_words(b, line, at - shift)
            below = constant(I8, line.type.count, (1 << at) - 1)
            bits = moved if bits is None else b.or_(b.and_(bits, below), b.and_(moved, b.not_(below)))
            at += width
        return call(b, "llvm.x86.avx512.permvar.qi.512", table.type, table, bits)


def _shift_words(b: ir.IRBuilder, line: ir.Value, bits: int) -> ir.Value:
    """Bytes shifted left, or right if bits is negative; what leaves one byte of two enters the other."""
    if bits == 0:
        return line
    words = b.bitcast(line, vector(I16, line.type.count // 2))
    count = constant(I16, words.type.count, abs(bits))
    return b.bitcast(b.shl(words, count) if bits > 0 else b.lshr(words, count), line.type)


class Amx(Avx512Vbmi):
    """Tiles of 16 tokens are products of matrices (npqwen/simd/amx.py); fewer tokens take `vpdpbusd`."""

    name: ClassVar[str] = "amx"
    features: ClassVar[frozenset[str]] = Avx512Vbmi.features | {"amx-tile", "amx-int8"}
    matrices: ClassVar[bool] = True

    @classmethod
    def allowed(cls) -> bool:
        """Linux lets a process use the registers on request (arch_prctl, since 5.16); no other system is asked."""
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return False
        system_call, arch_prctl, request_permission, tile_data = ctypes.CDLL(None).syscall, 158, 0x1023, 18
        return bool(system_call(arch_prctl, request_permission, tile_data) == 0)
