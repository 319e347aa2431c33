"""Packing of activations into the layout that the matrix kernels read (npqwen/simd/packed.py), and widths of tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import BLOCK_COLUMNS, ENCODINGS, UNIT_ROWS
from npqwen.kernels.matrix import IS_INTEGER
from npqwen.kernels.norm import swiglu
from npqwen.kernels.prompt_matmul import PROMPT_WIDTH
from npqwen.simd.blocks import quantize_block
from npqwen.simd.isa import ISA
from npqwen.simd.packed import (
    OCTET,
    block_bytes,
    paired_values_offset,
    scale_offset,
    start_offset,
    values_offset,
)
from npqwen.simd.scalar import float_bits, memory

WIDTHS = tuple(sorted(ISA.tiles))
"""Numbers of tokens that a tile can have."""
WIDEST = WIDTHS[-1]
PANELS_WIDTH = ISA.panels_width
"""The width of tiles whose weights are unpacked by panels; 0: there are none."""
ZERO_POINT = tuple(ISA.zero_point(encoding) for encoding in ENCODINGS)
"""The zero points that the kernels add to weights, by the code of their encoding."""
_MIDDLE = 4
_FEW = (2 if ISA.matrices else 3) * _MIDDLE
"""Most tokens for which several tiles of the middle width are faster than one of the widest."""
_MANY = 9 * _MIDDLE
"""Fewest tokens for which padding to whole tiles of the middle width costs less than tiles of half that width."""
_IS_UNPACKED = tuple(encoding.zero_point > 0 for encoding in ENCODINGS)
_PAIRS = ISA.pairs
_START_BYTES = ISA.start_bytes
_PAIR_PITCH = 2 * OCTET
"""Bytes from one octet of a token to its next where the tokens of a pair alternate; a compile-time literal."""


@njit(nogil=True)
def tile_width(tokens: int, encoding: int, prompt: bool) -> int:
    """The best tile width to multiply this many tokens with: one of WIDTHS, or PROMPT_WIDTH.

    encoding: the code of the weights' encoding. Encodings that take the same packed activations have the same widths.
    prompt: whether the tokens are those of a long part of a prompt.
    """
    if PROMPT_WIDTH and prompt and IS_INTEGER[encoding]:
        return PROMPT_WIDTH
    for width in WIDTHS:
        if width >= tokens and width <= _MIDDLE:
            return width
    if PANELS_WIDTH and (_IS_UNPACKED[encoding] or (0 < tokens % _MIDDLE <= PANELS_WIDTH and tokens < _MANY)):
        return PANELS_WIDTH
    return _MIDDLE if tokens <= _FEW else WIDEST


@njit(nogil=True)
def whole_tiles(tokens: int, width: int) -> int:
    """`tokens` rounded up to whole tiles.

    Padding tokens are packed too, as zeros or copies: stale bytes could read as subnormal floats, which are slow.
    """
    return (tokens + width - 1) // width * width


def packed_bytes(tokens: int, columns: int) -> int:
    """Bytes that hold this many tokens for any encoding and tile width; columns is a multiple of 128."""
    return -(-tokens // WIDEST) * WIDEST * columns * 4


@njit(nogil=True)
def packed_row_bytes(encoding: int, columns: int, width: int) -> int:
    """Bytes of one token for weights of an encoding (a code), in tiles of a width; columns is a multiple of 128."""
    if not IS_INTEGER[encoding]:
        return columns * 4
    if PROMPT_WIDTH and width == PROMPT_WIDTH:
        return columns * 2
    return columns // BLOCK_COLUMNS * block_bytes(1, _START_BYTES)


@njit(nogil=True)
def pack(x: Any, token: int, width: int, encoding: int, packed: Any) -> None:
    """Pack one token's activations x, float32 (columns,), a multiple of 128, into tiles of `width` tokens.

    encoding: the code of the encoding of the weights to multiply by. packed: uint8, all tokens'.
    """
    pack_part(x, np.int64(0), x.size, token, width, encoding, packed)


@njit(nogil=True, error_model="numpy")
def pack_part(x: Any, first: int, columns: int, token: int, width: int, encoding: int, packed: Any) -> None:
    """Pack x, one token's activations starting at column `first`; `columns`: the length of the whole row.

    first and x.size are multiples of 32; the rest is as for `pack`.
    """
    tile, lane = token // width, token % width
    start, size = packed.ctypes.data, packed.size
    floats = memory(start, size // 4, np.float32)
    if not IS_INTEGER[encoding]:
        at = (tile * columns + first) * width + lane
        for i in range(x.size):
            floats[at + i * width] = x[i]
        return
    if PROMPT_WIDTH and width == PROMPT_WIDTH:
        for block in range(x.size // BLOCK_COLUMNS):
            at = (tile * columns + first + block * BLOCK_COLUMNS) * width + lane * BLOCK_COLUMNS
            _round_block(x, block * BLOCK_COLUMNS, memory(start + 2 * at, BLOCK_COLUMNS, np.uint16))
        return
    values, zero_point = memory(start, size, np.int8), ZERO_POINT[encoding]
    for block in range(x.size // BLOCK_COLUMNS):
        at = (tile * (columns // BLOCK_COLUMNS) + first // BLOCK_COLUMNS + block) * block_bytes(width, _START_BYTES)
        start_at = at + start_offset(lane, width, _START_BYTES)
        if _PAIRS and width > 1:
            values_at = at + paired_values_offset(lane)
            scale = quantize_block(x, block * BLOCK_COLUMNS, values, values_at, _PAIR_PITCH, start_at, zero_point)
        else:
            values_at = at + values_offset(lane)
            scale = quantize_block(x, block * BLOCK_COLUMNS, values, values_at, OCTET, start_at, zero_point)
        floats[(at + scale_offset(lane, width)) // 4] = scale


@njit(nogil=True)
def _round_block(x: Any, at: int, out: Any) -> None:
    """out = 32 float32 x[at:] as bf16, ties to even; NaN stays NaN. out: uint16."""
    for i in range(BLOCK_COLUMNS):
        bits = float_bits(x[at + i])
        rounded = bits + np.int32(0x7FFF) + (bits >> np.int32(16) & np.int32(1))
        is_nan = bits & np.int32(0x7FFFFFFF) > np.int32(0x7F800000)
        out[i] = np.uint16((bits | np.int32(0x400000) if is_nan else rounded) >> np.int32(16))


@njit(nogil=True)
def copy_floats(source: Any, target: Any) -> None:
    """target[: source.size] = source; float32."""
    for i in range(source.size):
        target[i] = source[i]


@njit(nogil=True)
def pack_gated(
    local: Any, matrix: Any, first: int, last: int, start: int, count: int, width: int, down: Any, scratch: Any,
    gated: Any, kept: Any,
) -> None:  # fmt: skip
    """Pack silu(gate) * up as down_proj's activations, for `count` tokens starting at `start`.

    local: float32, the tokens' products with row groups first to last - 1 of gate_up_proj (matrix, a MATRIX); groups of
    gate and up alternate, and first is a multiple of GROUPS_PER_BLOCK. down: the MATRIX of down_proj. scratch: float32
    (down.cols,). gated: uint8, packed, tiles of `width` tokens. kept: float32 (tokens, down.cols) that receives the
    same activations unpacked, or no rows.
    """
    rows = UNIT_ROWS * (last - first)
    column = UNIT_ROWS * first // 2
    # After the last rows there are zeros, up to whole units of columns.
    product = scratch[: down.cols - column if UNIT_ROWS * last == matrix.rows else rows // 2]
    product[rows // 2 :] = np.float32(0.0)
    for t in range(count):
        swiglu(local[t * rows : (t + 1) * rows], product)
        pack_part(product, column, down.cols, start + t, width, down.encoding, gated)
        if kept.shape[0]:
            copy_floats(product, kept[start + t, column:])
