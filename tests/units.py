"""Units of FORMAT.md read byte by byte: the reference for the converter and the kernels."""

from __future__ import annotations

import numpy as np

UNIT_BYTES = {"int4": 576, "int8": 1088, "bf16": 2048}


def scales(units: np.ndarray) -> np.ndarray:
    """float32 scales (tiles, units, block, row) of int4 or int8 units (tiles, units, bytes)."""
    tiles, count, _ = units.shape
    return np.ascontiguousarray(units[:, :, :64]).view("<f2").reshape(tiles, count, 2, 16).astype(np.float32)


def integers(units: np.ndarray) -> np.ndarray:
    """The stored integers (16 * tiles, 64 * units) of int4 (0 to 15) or int8 units."""
    tiles, count, size = units.shape
    out = np.empty((tiles, 16, count, 2, 32), np.int32)
    for block in range(2):
        for r in range(16):
            for c in range(32):
                if size == UNIT_BYTES["int4"]:
                    j, k = c % 16 // 4, c % 4
                    byte = units[:, :, 64 + 256 * block + 64 * j + 4 * r + k]
                    out[:, r, :, block, c] = byte & 15 if c < 16 else byte >> 4
                else:
                    j, k = c // 4, c % 4
                    byte = units[:, :, 64 + 512 * block + 64 * j + 4 * r + k]
                    out[:, r, :, block, c] = byte.astype(np.int8)
    return out.reshape(16 * tiles, 64 * count)


def unpack(units: np.ndarray) -> np.ndarray:
    """The float32 weights (16 * tiles, 64 * units) of a matrix's units (tiles, units, bytes)."""
    tiles, count, size = units.shape
    if size == UNIT_BYTES["bf16"]:
        elements = np.ascontiguousarray(units).view("<u2").reshape(tiles, count, 64, 16)
        bits = elements.transpose(0, 3, 1, 2).reshape(16 * tiles, 64 * count)
        floats: np.ndarray = (bits.astype(np.uint32) << 16).view(np.float32)
        return floats
    q = integers(units) - (8 if size == UNIT_BYTES["int4"] else 0)
    scale = scales(units).transpose(0, 3, 1, 2).reshape(16 * tiles, 2 * count)
    weights: np.ndarray = q.astype(np.float32) * np.repeat(scale, 32, axis=1)
    return weights
