"""A matrix of weights where it is mapped: what is known of it, and how one of its rows is read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.simd.scalar import bits_float, memory, unhalf
from npqwen.simd.tile import ROWS

MATRIX = np.dtype([("address", np.int64), ("bits", np.int64), ("rows", np.int64), ("cols", np.int64)])
"""A mapped matrix: where its units lie, its encoding (4, 8 or 16 bits), its padded size."""
UNIT_COLS = 64
BLOCK_GROUPS = 4
"""Groups of 16 rows of gate and up that give a block of 32 of down_proj's activations."""
SCALE_BYTES = 64
"""Before an int4 or int8 unit's weights: two float16 for each of its rows."""
UNIT_BYTES = {4: 576, 8: 1088, 16: 2048}
_UNIT4, _UNIT8, _UNIT16 = UNIT_BYTES[4], UNIT_BYTES[8], UNIT_BYTES[16]


@njit(nogil=True)
def unit_bytes(bits: int) -> int:
    """Bytes of a unit of an encoding."""
    return _UNIT4 if bits == 4 else (_UNIT8 if bits == 8 else _UNIT16)


@njit(nogil=True)
def read_row(matrix: Any, row: int, out: Any) -> None:
    """Row `row` of a MATRIX as float32: out (cols,).  An embedding's look-up."""
    units = matrix.cols // UNIT_COLS
    group, r = row // ROWS, row % ROWS
    unit = unit_bytes(matrix.bits)
    w = memory(matrix.address + group * units * unit, units * unit, np.uint8)
    for u in range(units):
        if matrix.bits == 16:
            _read_bf16(w[u * unit : (u + 1) * unit], r, out[u * UNIT_COLS : (u + 1) * UNIT_COLS])
        else:
            _read_integers(
                w[u * unit : (u + 1) * unit], matrix.bits, r, out[u * UNIT_COLS : (u + 1) * UNIT_COLS]
            )


@njit(nogil=True)
def _read_bf16(unit: Any, r: int, out: Any) -> None:
    halves = unit.view(np.uint16)
    for c in range(UNIT_COLS):
        out[c] = bits_float(np.int32(halves[c * ROWS + r]) << np.int32(16))


@njit(nogil=True)
def _read_integers(unit: Any, bits: int, r: int, out: Any) -> None:
    scales = unit.view(np.uint16)
    for c in range(UNIT_COLS):
        block, quad, k = c // 32, c % 32 // 4, c % 4
        scale = unhalf(scales[ROWS * block + r])
        if bits == 4:
            pair = np.int32(unit[64 + 256 * block + 64 * (quad % 4) + 4 * r + k])
            q = (pair & np.int32(15) if quad < 4 else pair >> np.int32(4)) - np.int32(8)
        else:
            q = np.int32(np.int8(unit[64 + 512 * block + 64 * quad + 4 * r + k]))
        out[c] = np.float32(q) * scale
