"""The unit rows of FORMAT.md, read byte by byte: the twin of the converter and of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

PLANES = {"int4": (4,), "int8": (8,), "int5": (4, 1), "int6": (4, 2), "int3": (2, 1)}
"""Bits of the planes of a block, by encoding of integers."""
CODEBOOKS = {"int4": 16, "int3": 8}
"""Values in a codebook, of encodings that have one."""


def name_of(bits: int) -> str:
    """The encoding of so many bits."""
    return "bf16" if bits == 16 else f"int{bits}"


def unit_bytes(encoding: str) -> int:
    """Bytes of a unit: 64 of scales and four blocks of 64 a bit; or 128 columns of 16 times 2."""
    return 4096 if encoding == "bf16" else 64 + 4 * 64 * sum(PLANES[encoding])


def row_bytes(encoding: str, units: int) -> int:
    """Bytes of a unit row: the scales of 16 rows, and units."""
    return (0 if encoding == "bf16" else 64) + units * unit_bytes(encoding)


@dataclass
class Units:
    """A matrix as it is stored."""

    encoding: str
    rows: np.ndarray
    """uint8 (unit rows, bytes)."""
    codebook: np.ndarray | None = None
    """uint8 (64,)."""

    @property
    def units(self) -> int:
        """Units of a unit row."""
        return int(self.rows.shape[1] - row_bytes(self.encoding, 0)) // unit_bytes(self.encoding)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, padding included."""
        return 16 * len(self.rows), 128 * self.units

    @property
    def _units(self) -> np.ndarray:
        units: np.ndarray = self.rows[:, row_bytes(self.encoding, 0) :].reshape(len(self.rows), self.units, -1)
        return units

    @property
    def row_scales(self) -> np.ndarray:
        """float32 (rows,)."""
        scales: np.ndarray = np.ascontiguousarray(self.rows[:, :64]).view("<f4").reshape(-1)
        return scales

    @property
    def block_scales(self) -> np.ndarray:
        """int8 (rows, blocks)."""
        stored = self._units[:, :, :64].reshape(len(self.rows), self.units, 4, 16).view(np.int8)
        scales: np.ndarray = stored.transpose(0, 3, 1, 2).reshape(self.shape[0], -1)
        return scales

    @cached_property
    def integers(self) -> np.ndarray:
        """The stored integers, int32 (rows, columns): unsigned, those of int8 signed."""
        planes = PLANES[self.encoding]
        tiles = len(self.rows)
        blocks = self._units[:, :, 64:].reshape(tiles, self.units, 4, sum(planes), 64)
        out = np.zeros((tiles, self.units, 4, 8, 64), np.int32)
        for n in range(8):
            line, at = 0, 0
            for p in planes:
                stored = blocks[:, :, :, line + n % p].astype(np.int32)
                out[:, :, :, n] |= (stored >> n // p * p & (1 << p) - 1) << at
                line, at = line + p, at + p
        if self.encoding == "int8":
            out = out.astype(np.int8).astype(np.int32)
        # Byte 4 * r + k of a line: row r, column k of the quad.
        quads = out.reshape(tiles, self.units, 4, 8, 16, 4).transpose(0, 4, 1, 2, 3, 5)
        return np.asarray(quads.reshape(self.shape))

    @property
    def values(self) -> np.ndarray:
        """What the integers stand for, int32 (rows, columns)."""
        q = self.integers
        if self.encoding == "int8":
            return q
        if self.encoding in CODEBOOKS:
            assert self.codebook is not None
            found: np.ndarray = self.codebook[q].astype(np.int32)
            return found - 32
        return q * (64 >> sum(PLANES[self.encoding])) - 32

    @cached_property
    def weights(self) -> np.ndarray:
        """float32 (rows, columns)."""
        if self.encoding == "bf16":
            elements = np.ascontiguousarray(self.rows).view("<u2").reshape(len(self.rows), self.units, 128, 16)
            bits = elements.transpose(0, 3, 1, 2).reshape(self.shape)
            floats: np.ndarray = (bits.astype(np.uint32) << 16).view(np.float32)
            return floats
        scaled = self.values * np.repeat(self.block_scales.astype(np.int32), 32, axis=1)
        weights: np.ndarray = scaled.astype(np.float32) * self.row_scales[:, None]
        return weights


def read_units(encoding: str, stored: np.ndarray, codebook: np.ndarray | None = None) -> Units:
    """A matrix from its tensors."""
    return Units(encoding, stored, codebook if encoding in CODEBOOKS else None)
