"""AMX products in bf16, for long parts of prompts: no scaling of sums between blocks, only at the end of a row.

A block's weights times its int8 scale are at most 127 * 128, and rounded to 8 significant bits as the activations are.
The instruction multiplies 16 rows of 32 activations by 16 pairs of columns of 16 rows of weights, and adds float32.

Registers 0 to 3 hold sums, 16 tokens by 16 rows of weights: 0 and 1 the first 16 tokens by two row groups, 2 and 3 the
other 16 tokens. 4 and 5 hold the activations of a block of 32 columns, 6 and 7 its weights.
"""

from __future__ import annotations

from llvmlite import ir

from npqwen.format.encodings import ENCODINGS, UNIT_ROWS
from npqwen.simd.amx import do, shape
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import (
    CACHE_LINE,
    F32,
    I8,
    I32,
    I64,
    Array,
    Const,
    Int,
    Tile,
    constant,
    element,
    offset,
    operation,
    vector,
)

REGISTER_BYTES = 16 * CACHE_LINE
"""Bytes of a register: a block's weights, or its activations of 16 tokens."""
_HALVES = 2
"""Registers of activations: halves of a tile of 32 tokens."""
_SUMS, _ACTIVATIONS, _WEIGHTS = 0, 4, 6
"""The first register of each kind."""


@operation
def configure_full(b: ir.IRBuilder) -> None:
    """Give all of this thread's registers 16 rows of 64 bytes; called before any other, with `release` at the end."""
    shape(b, [16] * 8, [CACHE_LINE] * 8)


@operation
def unpack_bfloats(
    b: ir.IRBuilder, encoding: Const, codebook: Tile, w: Array, at: Int, scales_at: Int, out: Array, out_at: Int
) -> None:
    """out[out_at:] = the block of weights at uint8 w[at:] times its int8 scales at w[scales_at:], as bf16.

    16 pairs of neighbouring columns, each of 16 rows: REGISTER_BYTES. encoding: a code. codebook: from
    `npqwen.simd.amx.load_signed_codebook`.
    """
    lanes, kind = ISA.lanes, ENCODINGS[encoding]
    block, place = element(b, w, at, I8), element(b, out, out_at, I8)
    vectors = range(UNIT_ROWS // lanes)
    scales = [ISA.block_scales(b, offset(b, element(b, w, scales_at, I8), lanes * v, I8)) for v in vectors]
    zero_point = 0 if kind.codebook else kind.zero_point
    blocks = [offset(b, block, 4 * lanes * v, I8) for v in vectors]
    for n, quads in ISA.quads(b, kind, codebook[0], blocks):
        for v, (quad, scale) in enumerate(zip(quads, scales, strict=True)):
            values = b.bitcast(b.sub(quad, constant(I8, 4 * lanes, zero_point)), vector(I32, lanes))
            columns = [
                b.ashr(b.shl(values, constant(I32, lanes, 24 - 8 * k)), constant(I32, lanes, 24)) for k in range(4)
            ]
            weights = [b.fmul(b.sitofp(column, scale.type), scale) for column in columns]
            for pair in range(2):
                bits = ISA.bfloat_pairs(b, *weights[2 * pair : 2 * pair + 2])
                target = offset(b, place, CACHE_LINE * (2 * n + pair) + 4 * lanes * v, bits.type)
                b.store(bits, target, align=4 * lanes)


@operation
def clear_sums(b: ir.IRBuilder, groups: Const) -> None:
    """Set the sums of 32 tokens by `groups` row groups, 1 or 2, to zero."""
    for number in _sums(groups):
        do(b, "tilezero", I8(number))


@operation
def multiply_blocks(b: ir.IRBuilder, groups: Const, w: Array, at: Int, pitch: Int, x: Array, x_at: Int) -> None:
    """Add a block's products to the sums of 32 tokens by `groups` row groups, 1 or 2.

    w[at:]: the first group's block, from `unpack_bfloats`; w[at + pitch:]: the second's. x[x_at:]: the activations,
    32 bf16 of each token. All are uint8.
    """
    for half in range(_HALVES):
        activations = offset(b, element(b, x, x_at, I8), half * REGISTER_BYTES, I8)
        do(b, "tileloadd64", I8(_ACTIVATIONS + half), activations, I64(CACHE_LINE))
    for group in range(groups):
        weights = element(b, w, b.add(at, b.mul(pitch, I64(group))), I8)
        do(b, "tileloadd64", I8(_WEIGHTS + group), weights, I64(CACHE_LINE))
    for half in range(_HALVES):
        for group in range(groups):
            number = _SUMS + half * _HALVES + group
            do(b, "tdpbf16ps", I8(number), I8(_ACTIVATIONS + half), I8(_WEIGHTS + group))


@operation
def store_sums(b: ir.IRBuilder, groups: Const, out: Array) -> None:
    """Write the sums of 32 tokens by `groups` row groups to float32 `out`, 64-aligned: for each group, 32 tokens by 16.
    """
    for number in _sums(groups):
        half, group = divmod(number, _HALVES)
        target = offset(b, element(b, out, I64(0), F32), (group * _HALVES + half) * REGISTER_BYTES, I8)
        do(b, "tilestored64", I8(number), target, I64(CACHE_LINE))


def _sums(groups: int) -> list[int]:
    return [_SUMS + half * _HALVES + group for half in range(_HALVES) for group in range(groups)]
