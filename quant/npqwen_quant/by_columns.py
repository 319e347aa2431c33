"""Quantized matrices that a file stores transposed, as GPTQ and AWQ do, so that a row is scattered over all of it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npqwen_quant.recent import Recent
from npqwen_quant.tensors import SourceTensor

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Loaded:
    """A quantized matrix in memory: W[row, column] = (q - zero) * scale."""

    packed: npt.NDArray[np.uint32]
    """The integers q."""
    zeros: npt.NDArray[np.uint8]
    """(rows, groups)."""
    scales: F32
    """(rows, groups)."""
    groups: npt.NDArray[np.int64]
    """The group of each column, within bounds."""

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.zeros.nbytes + self.scales.nbytes + self.groups.nbytes


class ColumnsTensor(SourceTensor):
    """A quantized matrix that is stored transposed. Memory: see Recent."""

    def __init__(self, recent: Recent[Loaded]) -> None:
        self._recent = recent

    @abstractmethod
    def load(self) -> Loaded:
        """Read the whole matrix. Raises CheckpointError."""

    @abstractmethod
    def integers(self, packed: npt.NDArray[np.uint32], first: int, count: int) -> npt.NDArray[np.uint8]:
        """The integers (count, columns) of some rows."""

    def read(self, first: int, count: int) -> F32:
        """See SourceTensor: float32."""
        loaded = self._recent.get(self, self.load)
        rows = slice(first, first + count)
        values = self.integers(loaded.packed, first, count).astype(np.float32)
        values -= loaded.zeros[rows].take(loaded.groups, 1)
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            values *= loaded.scales[rows].take(loaded.groups, 1)
        return values
