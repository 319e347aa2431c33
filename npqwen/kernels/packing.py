"""Activations in the order in which the matrix kernels read them.

`width` tokens lie together, a *tile*.  For integer weights each block of 32 columns of a tile is `width` x 32
int8, `width` float32 scales and `width` int32 products of the weights' zero point with the sum of the block:
40 bytes a token.  (Where the instruction set multiplies pairs of tokens, the int8 of two lie together: 8 columns of
one, the same 8 of the other, the next 8 of the first.)  For bf16 weights each column of a tile is `width` float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import ENCODINGS
from npqwen.kernels.matrix import IS_INTEGER
from npqwen.simd.isa import ISA
from npqwen.simd.scalar import FAST
from npqwen.simd.tile import quantize_block

BLOCK = 32
BLOCK_BYTES = 40
WIDTHS = tuple(sorted(ISA.tiles))
ZERO_POINT = tuple(ISA.zero_point(encoding) for encoding in ENCODINGS)
"""What the kernels add to weights, by the code of their encoding."""
WIDEST = WIDTHS[-1]
_MIDDLE = 4
_FEW = (2 if ISA.matrices else 3) * _MIDDLE
"""Tokens up to which several tiles of the middle width are faster than one of the widest."""
_PAIRS = ISA.pairs


@njit(nogil=True)
def tile_width(tokens: int) -> int:
    """How many tokens the matrix kernels multiply at once, the best width for so many."""
    for width in WIDTHS:
        if width >= tokens and width <= _MIDDLE:
            return width
    return _MIDDLE if tokens <= _FEW else WIDEST


@njit(nogil=True)
def whole_tiles(tokens: int, width: int) -> int:
    """So many tokens and the places without one in the last tile.

    Those are packed too, as zeros or what else is at hand: what an earlier pass left there may be taken for numbers
    next to zero, with which processors are slow.
    """
    return (tokens + width - 1) // width * width


def packed_bytes(tokens: int, columns: int) -> int:
    """Bytes that hold so many tokens in either way, whatever the width; columns is a multiple of 64."""
    return -(-tokens // WIDEST) * WIDEST * columns * 4


@njit(nogil=True)
def pack(x: Any, token: int, width: int, encoding: int, packed: Any) -> None:
    """Put the activations of one token, float32 x (columns, a multiple of 64), into uint8 `packed`.

    encoding: the code of that of the weights they will be multiplied by.
    """
    pack_part(x, 0, x.size, token, width, encoding, packed)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def pack_part(x: Any, first: int, columns: int, token: int, width: int, encoding: int, packed: Any) -> None:
    """The same for some of a token's activations: x (a multiple of 32) is from column `first`, too, of so many."""
    tile, lane = token // width, token % width
    if not IS_INTEGER[encoding]:
        floats = packed.view(np.float32)
        at = (tile * columns + first) * width + lane
        for i in range(x.size):
            floats[at + i * width] = x[i]
    else:
        zero = ZERO_POINT[encoding]
        floats, words, bytes_ = packed.view(np.float32), packed.view(np.int32), packed.view(np.int8)
        for block in range(x.size // BLOCK):
            at = (tile * (columns // BLOCK) + first // BLOCK + block) * BLOCK_BYTES * width
            if _PAIRS and width > 1:
                place = at + 2 * BLOCK * (lane // 2) + 8 * (lane % 2)
                scale, total = quantize_block(x, block * BLOCK, bytes_, place, 16)
            else:
                scale, total = quantize_block(x, block * BLOCK, bytes_, at + BLOCK * lane, 8)
            floats[at // 4 + 8 * width + lane] = scale
            words[at // 4 + 9 * width + lane] = -zero * total


@njit(nogil=True)
def packed_row_bytes(encoding: int, columns: int) -> int:
    """Bytes of one token's packed activations; columns is a multiple of 64."""
    return columns // BLOCK * BLOCK_BYTES if IS_INTEGER[encoding] else columns * 4
