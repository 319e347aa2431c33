"""LoRA adapters merged into a checkpoint's weights as these are read: W + scale * B @ A, in float32.

npqwen/format/adapter.py reads what PEFT has saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.format.adapter import EMBEDDING as EMBEDDING
from npqwen.format.adapter import OUTPUT as OUTPUT
from npqwen.format.adapter import AdapterFile as AdapterFile
from npqwen.format.adapter import StoredAdapter
from npqwen.format.config import Config
from npqwen.format.factors import Factor, Factors
from npqwen.format.floats import widen
from npqwen_quant.recent import Recent
from npqwen_quant.tensors import PlainTensor, SourceTensor


class Adapter(StoredAdapter):
    """An adapter's directory, read and checked. Raises CheckpointError, naming what is wrong."""

    def apply(self, tensors: Mapping[str, SourceTensor], config: Config) -> dict[str, SourceTensor]:
        """The tensors with the adapter merged. CheckpointError for a matrix that is missing, or of another shape."""
        found = dict(tensors)
        for name, saved in self.saved.items():
            self._check(name, saved.shape, found)
            found[name] = PlainTensor(self.weights, saved)
        recent: Recent[npt.NDArray[Any]] = Recent()
        for name, factors in self.matrices(config).items():
            self._check(name, factors.shape, found)
            found[name] = AdaptedTensor(found[name], self.weights, factors, recent)
        return found

    def _check(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, SourceTensor]) -> None:
        self.check_shape(name, shape, tensors[name].shape if name in tensors else None)


class AdaptedTensor(SourceTensor):
    """A matrix of the checkpoint with an adapter's product added."""

    def __init__(
        self, base: SourceTensor, path: Path, factors: Factors, recent: Recent[npt.NDArray[Any]]
    ) -> None:
        """path: the adapter's file. recent: of its stored tensors, shared by all its matrices."""
        self.path = path
        self.shape = base.shape
        self.nbytes = base.nbytes + factors.a.nbytes + factors.b.nbytes
        self._base, self._factors, self._recent = base, factors, recent

    def check(self, name: str) -> None:
        """See SourceTensor."""
        self._base.check(name)

    def read(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """See SourceTensor."""
        left = widen(self._values(self._factors.b)[first : first + count])
        right = widen(self._values(self._factors.a))
        # Summed in float64: the order of a float32 product would depend on the number of rows.
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            product = (left.astype(np.float64) @ right.astype(np.float64)) * self._factors.scale
            rows: npt.NDArray[np.float32] = widen(self._base.read(first, count)) + product.astype(np.float32)
        return rows

    def _values(self, factor: Factor) -> npt.NDArray[Any]:
        tensor = PlainTensor(self.path, factor.stored)
        return factor.of(self._recent.get(factor.stored, lambda: tensor.read(0, tensor.shape[0])))
