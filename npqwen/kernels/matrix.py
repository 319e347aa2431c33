"""Records of mapped matrices, and reading one of their rows as float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import BLOCK_COLUMNS, ENCODINGS
from npqwen.simd.scalar import bits_float, memory, unhalf
from npqwen.simd.tile import ROWS, read_block_row

MATRIX = np.dtype([("address", np.int64), ("encoding", np.int64), ("rows", np.int64), ("cols", np.int64)])
"""A mapped matrix: the address of its units, the code of its encoding, its padded size."""
UNIT_COLS = 64
BLOCK_GROUPS = 4
"""Groups of 16 rows of gate and up that give a block of 32 of down_proj's activations."""
UNIT_BYTES = tuple(encoding.unit_bytes for encoding in ENCODINGS)
"""Bytes of a unit, by the code of its encoding."""
IS_INTEGER = tuple(encoding.is_integer for encoding in ENCODINGS)
"""Whether an encoding stores integers and scales, by its code."""
_SCALE_BYTES = tuple(encoding.scale_bytes for encoding in ENCODINGS)
_BLOCK_BYTES = tuple(encoding.block_bytes for encoding in ENCODINGS)


@njit(nogil=True)
def unit_bytes(encoding: int) -> int:
    """Bytes of a unit of the encoding with this code."""
    return UNIT_BYTES[encoding]


@njit(nogil=True)
def read_row(matrix: Any, row: int, out: Any) -> None:
    """out = row `row` of a MATRIX, an embedding's look-up; out: float32 (matrix.cols,)."""
    units, encoding = matrix.cols // UNIT_COLS, matrix.encoding
    group, r = row // ROWS, row % ROWS
    unit = unit_bytes(encoding)
    w = memory(matrix.address + group * units * unit, units * unit, np.uint8)
    halves = w.view(np.uint16)
    for u in range(units):
        if IS_INTEGER[encoding]:
            for block in range(UNIT_COLS // BLOCK_COLUMNS):
                scale = unhalf(halves[u * unit // 2 + ROWS * block + r])
                at = u * unit + _SCALE_BYTES[encoding] + _BLOCK_BYTES[encoding] * block
                read_block_row(encoding, r, w, at, scale, out, u * UNIT_COLS + block * BLOCK_COLUMNS)
        else:
            for c in range(UNIT_COLS):
                bits = np.int32(halves[u * unit // 2 + c * ROWS + r]) << np.int32(16)
                out[u * UNIT_COLS + c] = bits_float(bits)
