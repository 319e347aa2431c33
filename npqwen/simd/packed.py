"""Packed activations: how the matrix kernels find the values, scales and starts of a tile of tokens.

For a matrix of an integer encoding, each block of 32 columns of a tile of `width` tokens is

    32 * width bytes   int8 values, token after token
     4 * width bytes   float32 scale of each token: the largest magnitude / 127
     start_bytes * width bytes
                       start of each token, to which a block's products are added: minus the kernel's zero point
                       (`InstructionSet.zero_point`) times the sum of the token's values, int32, or what
                       `InstructionSet.pack_start` makes of it: several such sums of some of the values, or copies

and the blocks of a tile follow each other. Where the instruction set multiplies pairs of tokens
(`InstructionSet.pairs`), the values of two tokens alternate: 8 columns of the first, the same 8 of the second, the next
8 of the first. For a matrix of floats each column of a tile is `width` float32.

The functions return offsets in bytes, in compiled code as well as in code generation. start_bytes is that of the
instruction set.
"""

from __future__ import annotations

from numba.extending import register_jitable

from npqwen.format.encodings import BLOCK_COLUMNS

SCALE_BYTES = 4
OCTET = 8
"""Columns that lie together where tokens alternate."""


@register_jitable
def block_bytes(width: int, start_bytes: int) -> int:
    """Bytes of a block of `width` tokens."""
    return (BLOCK_COLUMNS + SCALE_BYTES + start_bytes) * width


@register_jitable
def values_offset(token: int) -> int:
    """Offset of the 32 values of a token; for pairs, of those of two tokens, `token` being the first, and even."""
    return BLOCK_COLUMNS * token


@register_jitable
def paired_values_offset(token: int) -> int:
    """Offset of a token's first octet if the values of two tokens alternate; the others follow every 2 * OCTET."""
    return 2 * BLOCK_COLUMNS * (token // 2) + OCTET * (token % 2)


@register_jitable
def scale_offset(token: int, width: int) -> int:
    """Offset of a token's scale in its block."""
    return BLOCK_COLUMNS * width + SCALE_BYTES * token


@register_jitable
def start_offset(token: int, width: int, start_bytes: int) -> int:
    """Offset of a token's start in its block."""
    return (BLOCK_COLUMNS + SCALE_BYTES) * width + start_bytes * token
