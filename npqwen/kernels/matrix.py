"""Records of mapped matrices, and reading one of their rows as float32.

A matrix of an integer encoding is stored in units of 16 rows x 64 columns (quant/FORMAT.md), the units of 16 rows, a
*row group*, one after the other:

    scale_bytes    float16 scales: 16 rows of block 0, then 16 rows of block 1
    block_bytes    weights of block 0, columns 0 to 31
    block_bytes    weights of block 1, columns 32 to 63

The weights of a block are 8 quads, or for int4 4 pairs of them: 4 neighbouring columns of row 0, the same of row 1, and
so on; that is one vector of 64 bytes, or several that share them. A unit of bf16 is 64 columns of 16 rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import BLOCK_COLUMNS, ENCODINGS, UNIT_BLOCKS, UNIT_COLUMNS, UNIT_ROWS
from npqwen.simd.blocks import dequantize_block_row
from npqwen.simd.scalar import bits_float, memory, unhalf

MATRIX = np.dtype([("address", np.int64), ("encoding", np.int64), ("rows", np.int64), ("cols", np.int64)])
"""A mapped matrix: the address of its units, the code of its encoding, its padded size."""
GROUPS_PER_BLOCK = 2 * BLOCK_COLUMNS // UNIT_ROWS
"""Row groups of gate_up_proj, gate and up alternating, whose results make one block of down_proj's activations."""
# By the code of an encoding.
IS_INTEGER = tuple(encoding.is_integer for encoding in ENCODINGS)
UNIT_BYTES = tuple(encoding.unit_bytes for encoding in ENCODINGS)
_SCALE_BYTES = tuple(encoding.scale_bytes for encoding in ENCODINGS)
_BLOCK_BYTES = tuple(encoding.block_bytes for encoding in ENCODINGS)


@njit(nogil=True)
def group_bytes(matrix: Any) -> int:
    """Bytes of a row group of a MATRIX."""
    return matrix.cols // UNIT_COLUMNS * UNIT_BYTES[matrix.encoding]


@njit(nogil=True)
def read_row(matrix: Any, row: int, out: Any) -> None:
    """out = row `row` of a MATRIX, as an embedding is looked up; out: float32 (matrix.cols,)."""
    encoding, r = matrix.encoding, row % UNIT_ROWS
    unit, size = UNIT_BYTES[encoding], group_bytes(matrix)
    w = memory(matrix.address + row // UNIT_ROWS * size, size, np.uint8)
    halves = w.view(np.uint16)
    for u in range(matrix.cols // UNIT_COLUMNS):
        if IS_INTEGER[encoding]:
            for block in range(UNIT_BLOCKS):
                scale = unhalf(halves[u * unit // 2 + UNIT_ROWS * block + r])
                at = u * unit + _SCALE_BYTES[encoding] + _BLOCK_BYTES[encoding] * block
                dequantize_block_row(encoding, r, w, at, scale, out, u * UNIT_COLUMNS + block * BLOCK_COLUMNS)
        else:
            for c in range(UNIT_COLUMNS):
                bits = np.int32(halves[u * unit // 2 + UNIT_ROWS * c + r]) << np.int32(16)
                out[u * UNIT_COLUMNS + c] = bits_float(bits)
