"""LoRA adapters merged into a checkpoint's weights as these are read: W + scale * B @ A, in float32.

npqwen/format/adapter.py reads what PEFT has saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from npqwen.format.adapter import EMBEDDING as EMBEDDING
from npqwen.format.adapter import OUTPUT as OUTPUT
from npqwen.format.adapter import AdapterFile as AdapterFile
from npqwen.format.adapter import Factors, StoredAdapter
from npqwen_quant.tensors import PlainTensor, SourceTensor, widen


class Adapter(StoredAdapter):
    """An adapter's directory, read and checked. Raises CheckpointError, naming what is wrong."""

    def apply(self, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """The tensors with the adapter merged. CheckpointError for a matrix that is missing, or of another shape."""
        found = dict(tensors)
        for name, saved in self.saved.items():
            self._check(name, saved.shape, found)
            found[name] = PlainTensor(self.weights, saved)
        for name, factors in self.factors.items():
            self._check(name, factors.shape, found)
            found[name] = AdaptedTensor(found[name], self.weights, factors)
        return found

    def _check(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, SourceTensor]) -> None:
        self.check_shape(name, shape, tensors[name].shape if name in tensors else None)


class AdaptedTensor(SourceTensor):
    """A matrix of the checkpoint with an adapter's product added."""

    def __init__(self, base: SourceTensor, path: Path, factors: Factors) -> None:
        self.path = path
        self.shape = base.shape
        self._base, self._factors = base, factors
        self._a, self._b = PlainTensor(path, factors.a), PlainTensor(path, factors.b)
        self.nbytes = base.nbytes + self._a.nbytes + self._b.nbytes

    def check(self, name: str) -> None:
        """See SourceTensor."""
        self._base.check(name)

    def read(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """See SourceTensor."""
        if self._factors.transposed:
            left, right = _columns(self._a, first, count), _all(self._b).T
        else:
            left, right = widen(self._b.read(first, count)), _all(self._a)
        assert left.shape == (count, self._factors.rank)
        # Summed in float64: the order of a float32 product would depend on the number of rows.
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            product = (left.astype(np.float64) @ right.astype(np.float64)) * self._factors.scale
            rows: npt.NDArray[np.float32] = widen(self._base.read(first, count)) + product.astype(np.float32)
        return rows


def _all(tensor: PlainTensor) -> npt.NDArray[np.float32]:
    return widen(tensor.read(0, tensor.shape[0]))


def _columns(tensor: PlainTensor, first: int, count: int) -> npt.NDArray[np.float32]:
    """Some columns of a matrix, as rows."""
    return np.stack([widen(tensor.entry(row).read(first, count)) for row in range(tensor.shape[0])], axis=1)
