"""Records of mapped matrices, and reading one of their rows as float32.

A matrix of an encoding of integers is stored in unit rows (quant/FORMAT.md), each of 16 rows, also called a *row
group*:

    row_scale_bytes    float32 scales of the 16 rows
    unit_bytes         units of 128 columns, one after the other, each of
        scale_bytes    int8 scales: 16 rows of block 0, then those of blocks 1 to 3
        block_bytes    weights of block 0, columns 0 to 31; then those of blocks 1 to 3

A unit of bf16 is 128 columns of 16 rows, and there are no scales.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import BLOCK_COLUMNS, CODEBOOK_BYTES, ENCODINGS, UNIT_BLOCKS, UNIT_COLUMNS, UNIT_ROWS
from npqwen.simd.blocks import read_block_row
from npqwen.simd.scalar import bits_float, memory

MATRIX = np.dtype(
    [
        ("address", np.int64),
        ("codebook", np.int64),
        ("encoding", np.int64),
        ("rows", np.int64),
        ("cols", np.int64),
    ]
)
"""A mapped matrix: the address of its unit rows, that of its codebook or 0, the code of its encoding, its padded size.
"""
GROUPS_PER_BLOCK = 2 * BLOCK_COLUMNS // UNIT_ROWS
"""Row groups of gate_up_proj, gate and up alternating, whose results make one block of down_proj's activations."""
# By the code of an encoding.
IS_INTEGER = tuple(encoding.is_integer for encoding in ENCODINGS)
UNIT_BYTES = tuple(encoding.unit_bytes for encoding in ENCODINGS)
_ROW_SCALE_BYTES = tuple(encoding.row_scale_bytes for encoding in ENCODINGS)
_SCALE_BYTES = tuple(encoding.scale_bytes for encoding in ENCODINGS)
_BLOCK_BYTES = tuple(encoding.block_bytes for encoding in ENCODINGS)


@njit(nogil=True)
def group_bytes(matrix: Any) -> int:
    """Bytes of a row group of a MATRIX."""
    return _ROW_SCALE_BYTES[matrix.encoding] + matrix.cols // UNIT_COLUMNS * UNIT_BYTES[matrix.encoding]


@njit(nogil=True)
def read_row(matrix: Any, row: int, out: Any) -> None:
    """out = row `row` of a MATRIX, as an embedding is looked up; out: float32 (matrix.cols,)."""
    encoding, r = matrix.encoding, row % UNIT_ROWS
    size = group_bytes(matrix)
    address = matrix.address + row // UNIT_ROWS * size
    w, block_scales = memory(address, size, np.uint8), memory(address, size, np.int8)
    row_scales, halves = memory(address, UNIT_ROWS, np.float32), memory(address, size // 2, np.uint16)
    for u in range(matrix.cols // UNIT_COLUMNS):
        unit = _ROW_SCALE_BYTES[encoding] + u * UNIT_BYTES[encoding]
        if IS_INTEGER[encoding]:
            codebook = memory(matrix.codebook, CODEBOOK_BYTES, np.uint8)
            for block in range(UNIT_BLOCKS):
                at = unit + _SCALE_BYTES[encoding] + _BLOCK_BYTES[encoding] * block
                block_scale = np.float32(block_scales[unit + UNIT_ROWS * block + r])
                place = u * UNIT_COLUMNS + block * BLOCK_COLUMNS
                read_block_row(encoding, r, w, at, codebook, row_scales[r], block_scale, out, place)
        else:
            for c in range(UNIT_COLUMNS):
                bits = np.int32(halves[unit // 2 + UNIT_ROWS * c + r]) << np.int32(16)
                out[u * UNIT_COLUMNS + c] = bits_float(bits)
