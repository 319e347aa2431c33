"""x86-64: AVX2, the dot-product instruction `vpdpbusd` in its 256- and 512-bit forms, and byte shuffles."""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

from llvmlite import ir

from npqwen.format.encodings import Encoding
from npqwen.simd.instructions import QUADS, Field, NativeHalf, Quads
from npqwen.simd.llvm import CACHE_LINE, I8, I16, I32, call, constant, offset, prefetch_line, settle, splat, vector
from npqwen.simd.packed import start_offset


class _Avx(NativeHalf):
    """Registers of 256 bits, and a byte shuffle."""

    lanes: ClassVar[int] = 8

    def lookup(self, b: ir.IRBuilder, table: ir.Value, indices: ir.Value) -> ir.Value:
        # Within each 16 bytes, by the low nibbles of bytes whose highest bit is 0.
        return call(b, "llvm.x86.avx2.pshuf.b", indices.type, table, indices)


class Avx2(_Avx):
    """`vpmaddubsw` multiplies unsigned by signed bytes and adds pairs in int16, `vpmaddwd` adds those up in int32.

    On a Zen 5, they share two pipes with multiplications of floats, and these pipes are the limit. So four quads, half
    a block, are added up in int16 before they are widened, with their start: minus the zero point, 32, times the sum of
    a lane's activations. Activations are -127 to 127, weights with the zero point 0 to 63, so that
    - `vpmaddubsw` cannot saturate: 2 * 63 * 127 = 16,002 is less than 32,767;
    - additions may wrap around, but the final sum fits: without the zero point it is at most
      4 * 2 * 32 * 127 = 32,512. The sum of a whole block would not fit.
    Widening is a multiplication anyway, so it multiplies by the block's scale, too. Two tokens by two vectors need the
    fewest loads, and fit sixteen registers.
    """

    name: ClassVar[str] = "avx2"
    features: ClassVar[frozenset[str]] = frozenset({"avx2", "fma", "f16c"})
    tiles: ClassVar[dict[int, int]] = {1: 2, 2: 2, 4: 2}
    unpack_from: ClassVar[int] = 0
    panels_width: ClassVar[int] = 2
    unpacked_vectors: ClassVar[int] = 2
    start_bytes: ClassVar[int] = 8
    _ones: ClassVar[ir.Constant] = constant(I16, 16, 1)

    def pack_start(self, b: ir.IRBuilder, activations: ir.Value, zero_point: ir.Value) -> ir.Value:
        # Four int16: for each half of the quads, the sums of their columns 0 and 1, and of 2 and 3.
        def folded(lanes: ir.Value, low: list[int], high: list[int]) -> ir.Value:
            parts = [b.shuffle_vector(lanes, lanes, ir.Constant(vector(I32, len(n)), n)) for n in (low, high)]
            return b.add(*parts)

        octets = folded(activations, list(range(16)), list(range(16, 32)))  # columns 0 to 7 and 8 to 15 of either 16
        columns = folded(octets, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])
        sums = folded(columns, [0, 2, 4, 6], [1, 3, 5, 7])
        return b.trunc(b.mul(sums, splat(b, b.neg(zero_point), 4)), vector(I16, 4))

    def order(self, encoding: Encoding) -> list[int]:
        return sorted(super().order(encoding), key=_half)

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        if not encoding.zero_point:
            return self._signed_products(b, encoding, table, blocks, x, tokens)
        return self._unsigned_products(b, encoding, table, blocks, lambda: [self._ones] * len(blocks), x, tokens)

    def scaled_products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], scales: list[ir.Value],
        x: ir.Value, tokens: int,
    ) -> Iterator[list[ir.Value]]:  # fmt: skip
        if not encoding.zero_point:
            yield from super().scaled_products(b, encoding, table, blocks, scales, x, tokens)
            return

        def factors() -> list[ir.Value]:
            return [self._scale_pairs(b, place) for place in scales]

        for sums in self._unsigned_products(b, encoding, table, blocks, factors, x, tokens):
            yield [self.to_float(b, total) for total in sums]

    def _scale_pairs(self, b: ir.IRBuilder, place: ir.Value) -> ir.Value:
        """The int8 scales of the rows at `place`, each twice, <16 x i16>."""
        scales = b.load(b.bitcast(place, vector(I8, self.lanes).as_pointer()), align=1)
        words = b.bitcast(b.sext(scales, vector(I32, self.lanes)), vector(I16, 2 * self.lanes))
        low = ir.Constant(vector(I32, 2 * self.lanes), [n // 2 * 2 for n in range(2 * self.lanes)])
        return b.shuffle_vector(words, words, low)

    def _unsigned_products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value],
        factors: Callable[[], list[ir.Value]], x: ir.Value, tokens: int,
    ) -> Iterator[list[ir.Value]]:  # fmt: skip
        """`products` of weights from 0 to 63 times the blocks' factors, <16 x i16>, the same number twice per row.

        factors: a function that emits them.
        """
        together = min(tokens, 2)
        # Loaded up front, they would occupy registers that a tile of more tokens lacks.
        scales = factors() if tokens == together else []
        quads = self.quads(b, encoding, table, blocks)
        halves: list[list[list[ir.Value]]] = []
        for half in range(2):
            # One half after the other for all tokens: the quads of a whole block would not fit the registers.
            taken = itertools.islice(quads, QUADS // 2)
            shared = list(taken) if tokens > together else taken
            rows: list[list[ir.Value]] = []
            for first in range(0, tokens, together):
                sums = [[self._half_start(b, x, first + t, tokens, half)] * len(blocks) for t in range(together)]
                for n, vectors in shared:
                    for t, row in enumerate(sums, first):
                        activations = b.bitcast(self.broadcast(b, x, t, n), vectors[0].type)
                        pairs = [_pairs(b, quad, activations) for quad in vectors]
                        row[:] = map(b.add, row, pairs)
                    sums = _settled(b, sums) if tokens > 1 else sums
                rows += sums
                scales = scales or factors()
            halves.append([list(map(functools.partial(_widen, b), row, scales)) for row in rows])
        for pair in zip(*halves, strict=True):
            yield list(map(b.add, *pair))

    def dot_weights(self, b: ir.IRBuilder, total: ir.Value, quad: ir.Value, weights: ir.Value) -> ir.Value:
        signed, unsigned = (b.bitcast(each, vector(I8, 4 * self.lanes)) for each in (quad, weights))
        return b.add(total, _widen(b, _pairs(b, unsigned, signed), self._ones))  # 2 * 127 * 127 fits int16

    def _half_start(self, b: ir.IRBuilder, x: ir.Value, token: int, tokens: int, half: int) -> ir.Value:
        """The initial value of a token's sums of half the quads, <16 x i16>."""
        place = offset(b, x, start_offset(token, tokens, self.start_bytes) + 4 * half, I32)
        return b.bitcast(splat(b, b.load(place, align=4), self.lanes), vector(I16, 2 * self.lanes))

    def _signed_products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        """`products` of weights from -127 to 127, without a start: int16 has no room for two pairs, 4 * 127 * 127."""
        totals: list[list[ir.Value]] = [[] for _ in range(tokens)]
        for part in [blocks] if tokens == 1 else [[block] for block in blocks]:
            sums = [[constant(I32, self.lanes, 0)] * len(part) for _ in range(tokens)]
            for n, quads in self.quads(b, encoding, table, part):
                magnitudes = [_with_sign(b, quad, quad) for quad in quads]
                for t, row in enumerate(sums):
                    activations = b.bitcast(self.broadcast(b, x, t, n), quads[0].type)
                    for r, (quad, magnitude) in enumerate(zip(quads, magnitudes, strict=True)):
                        pairs = _pairs(b, magnitude, _with_sign(b, activations, quad))
                        row[r] = b.add(row[r], _widen(b, pairs, self._ones))
            for total, row in zip(totals, _settled(b, sums) if tokens > 1 else sums, strict=True):
                total += row
        yield from totals


def _half(quad: int) -> int:
    """The half of a block's quads, 0 or 1, that a quad is added up with: with the others of the same stored lines."""
    return quad // 2 % 2


def _settled(b: ir.IRBuilder, rows: list[list[ir.Value]]) -> list[list[ir.Value]]:
    """`settle` of rows of vectors."""
    values = iter(settle(b, "x", [value for row in rows for value in row]))
    return [[next(values) for _ in row] for row in rows]


def _pairs(b: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """Sums of two neighbouring products of bytes, <16 x i16>."""
    return call(b, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), unsigned, signed)


def _with_sign(b: ir.IRBuilder, x: ir.Value, sign: ir.Value) -> ir.Value:
    """x * sign(sign), byte by byte."""
    return call(b, "llvm.x86.avx2.psign.b", x.type, x, sign)


def _widen(b: ir.IRBuilder, pairs: ir.Value, factors: ir.Value) -> ir.Value:
    """Neighbouring int16 times their factors, <16 x i16>, added up in int32."""
    return call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), pairs, factors)


class AvxVnni(_Avx):
    """`vpdpbusd` on 256 bits: four unsigned by signed products added to an int32 lane at once."""

    name: ClassVar[str] = "avxvnni"
    features: ClassVar[frozenset[str]] = frozenset({"avx2", "fma", "f16c", "avxvnni"})

    def zero_point(self, encoding: Encoding) -> int:
        return encoding.zero_point or 128

    def dot_weights(self, b: ir.IRBuilder, total: ir.Value, quad: ir.Value, weights: ir.Value) -> ir.Value:
        return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", total.type, total, weights, quad)

    def products(
        self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value], x: ir.Value, tokens: int
    ) -> Iterator[list[ir.Value]]:
        # Independent sums side by side: eight dependent instructions would wait for each other.
        chains, together = (2, 1) if tokens == 1 else (1, min(tokens, 4))
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
        if self.distance:
            prefetch_line(b, offset(b, block, self.distance + CACHE_LINE * n, I8))
        return super().line(b, block, n)

    def quads(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value]) -> Quads:
        # All of them before the products: there are enough registers, and with one token that is 1% faster.
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
    """Bytes shifted left, or right if bits is negative; bits shifted out of one byte of a pair enter the other."""
    if bits == 0:
        return line
    words = b.bitcast(line, vector(I16, line.type.count // 2))
    count = constant(I16, words.type.count, abs(bits))
    return b.bitcast(b.shl(words, count) if bits > 0 else b.lshr(words, count), line.type)


class Amx(Avx512Vbmi):
    """Tiles of 16 tokens are multiplied as matrices (npqwen/simd/amx.py); narrower tiles use `vpdpbusd`."""

    name: ClassVar[str] = "amx"
    features: ClassVar[frozenset[str]] = Avx512Vbmi.features | {"amx-tile", "amx-int8"}
    matrices: ClassVar[bool] = True

    @classmethod
    def allowed(cls) -> bool:
        """Linux lets a process use the registers on request (arch_prctl, since 5.16); elsewhere, returns False."""
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return False
        system_call, arch_prctl, request_permission, tile_data = ctypes.CDLL(None).syscall, 158, 0x1023, 18
        return bool(system_call(arch_prctl, request_permission, tile_data) == 0)


class AmxBf16(Amx):
    """Long parts of prompts are multiplied in bf16 (npqwen/simd/amx_bf16.py), which gives other last bits."""

    name: ClassVar[str] = "amxbf16"
    features: ClassVar[frozenset[str]] = Amx.features | {"amx-bf16", "avx512bf16"}
    prompt_width: ClassVar[int] = 32

    def bfloat_pairs(self, b: ir.IRBuilder, even: ir.Value, odd: ir.Value) -> ir.Value:
        # The second operand's elements come first. From LLVM 16 on, the result is <32 x bfloat>, and converted.
        halves = call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", vector(I16, 32), odd, even)
        alternating = ir.Constant(vector(I32, 32), [n // 2 + n % 2 * 16 for n in range(32)])
        return b.bitcast(b.shuffle_vector(halves, halves, alternating), vector(I32, 16))
