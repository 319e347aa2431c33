"""The bytes of matrices: unit rows of integers with scales, or of bf16 (FORMAT.md, "Units")."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.format.encodings import BLOCK_COLUMNS, CODEBOOK_BYTES, UNIT_BLOCKS, UNIT_COLUMNS, UNIT_ROWS, Encoding
from npqwen.format.layout import ceil_div
from npqwen_quant.fit import fit
from npqwen_quant.search import jit

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]

Fit = tuple[U8, I8, F32]
"""Integers (rows, columns) that index the encoding's values, block scales (rows, columns / 32), row scales (rows,)."""


@jit
def _store(q: U8, scales: I8, planes: Any, offset: int, units: U8) -> None:
    """Write the units of up to 16 rows. offset: added to each q before it is stored, in two's complement."""
    row_count = q.shape[0]
    size = units.size // (q.shape[1] // UNIT_COLUMNS)
    units[:] = 0
    for u in range(q.shape[1] // UNIT_COLUMNS):
        for block in range(UNIT_BLOCKS):
            for r in range(row_count):
                units[u * size + UNIT_ROWS * block + r] = np.uint8(scales[r, UNIT_BLOCKS * u + block])
            at = u * size + UNIT_BLOCKS * UNIT_ROWS + (size - UNIT_BLOCKS * UNIT_ROWS) // UNIT_BLOCKS * block
            column = u * UNIT_COLUMNS + BLOCK_COLUMNS * block
            for n in range(8):
                line, shift = 0, 0
                for p in planes:
                    place = at + 64 * (line + n % p)
                    for r in range(row_count):
                        for k in range(4):
                            bits = (int(q[r, column + 4 * n + k]) + offset >> shift) & ((1 << p) - 1)
                            units[place + 4 * r + k] |= np.uint8(bits << n // p * p)
                    line += p
                    shift += p


def store(fitted: Fit, encoding: Encoding, out: U8, start: int, stride: int) -> None:
    """Write fitted rows as the unit rows out[start], out[start + stride], ...

    out: (unit rows, bytes per unit row), contiguous.
    """
    q, scales, row_scales = fitted
    units = ceil_div(q.shape[1], UNIT_COLUMNS)
    q = np.pad(q, ((0, 0), (0, units * UNIT_COLUMNS - q.shape[1])))
    scales = np.pad(scales, ((0, 0), (0, units * UNIT_BLOCKS - scales.shape[1])))
    head = encoding.row_scale_bytes
    # Without a zero point the values are stored; the first is the smallest.
    offset = 0 if encoding.zero_point else encoding.values[0]
    # Rounding up must not make a weight infinite.
    most = np.finfo(np.float32).max * (1 - 2.0**-20) / 127 / max(map(abs, encoding.values))
    row_scales = np.minimum(row_scales, np.float32(most))
    for i in range(ceil_div(len(q), UNIT_ROWS)):
        rows = slice(i * UNIT_ROWS, (i + 1) * UNIT_ROWS)
        line = out[start + i * stride]
        padded = np.zeros(UNIT_ROWS, np.float32)
        padded[: len(q[rows])] = row_scales[rows]
        line[:head] = padded.view(np.uint8)
        _store(q[rows], scales[rows], encoding.planes, offset, line[head:])


def quantize(rows: F32, out: U8, start: int, stride: int, encoding: Encoding) -> float:
    """`fit` and `store` rows (n, columns) as the unit rows out[start], out[start + stride], ...

    out: (unit rows, bytes per unit row), contiguous. Returns the largest magnitude: if it is NaN or infinite, so is a
    weight, and nothing is stored.
    """
    largest = float(np.maximum(rows.max(initial=0), -rows.min(initial=0)))
    if np.isfinite(largest):
        store(fit(rows, np.array(encoding.values, np.float32)), encoding, out, start, stride)
    return largest


def codebook(encoding: Encoding) -> U8:
    """The codebook of an encoding that has one, as it is stored."""
    values = np.array(encoding.codebook) + encoding.zero_point
    return np.resize(values.astype(np.uint8), CODEBOOK_BYTES)


def pack_bf16(bits: npt.NDArray[np.uint16], out: npt.NDArray[np.uint8], start: int, stride: int) -> None:
    """Store bf16 rows (n, columns), given by their bits, in the unit rows out[start], out[start + stride], ...

    out: (unit rows, bytes per unit row), contiguous.
    """
    n, columns = bits.shape
    unit_rows, units = ceil_div(n, UNIT_ROWS), ceil_div(columns, UNIT_COLUMNS)
    padded = np.zeros((unit_rows, UNIT_ROWS, units, UNIT_COLUMNS), np.uint16)
    padded.reshape(unit_rows * UNIT_ROWS, -1)[:n, :columns] = bits
    view = out.view(np.uint16)[start : start + (unit_rows - 1) * stride + 1 : stride]
    view.reshape(unit_rows, units, UNIT_COLUMNS, UNIT_ROWS)[:] = padded.transpose(0, 2, 3, 1)
