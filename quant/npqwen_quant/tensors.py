"""Tensors of a checkpoint, located in its files and read by rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.files import fill, open_regular
from npqwen.format.floats import DTYPES, widen
from npqwen.format.safetensors import StoredTensor, stored_tensors
from npqwen.wording import shortened, unreadable


class SourceTensor(ABC):
    """A tensor of a checkpoint, read by rows, however it is stored.

    path: the file that messages name. shape: of the weights. nbytes: of all of it in the files.
    """

    path: Path
    shape: tuple[int, ...]
    nbytes: int

    @abstractmethod
    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """Read `count` rows (elements of a vector), starting at row `first`, into a new array of float32, float16 or
        uint16 (the bits of bf16).

        Raises CheckpointError if the file cannot be read or is too short. The values may be NaN or infinity.
        """

    def check(self, name: str) -> None:  # noqa: B027  most can be converted
        """Raise CheckpointError, with the tensor's name, if `read` could not give its weights."""

    def floats(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """`read`, as float32; CheckpointError for NaN and infinity too."""
        floats = widen(self.read(first, count))
        if not np.isfinite(floats).all():
            raise CheckpointError(f"{self.path} holds NaN or infinity; the checkpoint is broken")
        return floats


class PlainTensor(SourceTensor):
    """A tensor, read as a safetensors file stores it."""

    def __init__(self, path: Path, stored: StoredTensor) -> None:
        self.path = path
        self.stored = stored
        self.shape = stored.shape
        self.nbytes = stored.nbytes

    def check(self, name: str) -> None:
        """Raise CheckpointError for a dtype that cannot be converted."""
        if self.stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {shortened(self.stored.dtype)}; only BF16, F16 and F32 can be "
                "converted"
            )

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """See SourceTensor."""
        return self.stored_rows(first, count, DTYPES[self.stored.dtype])

    def entry(self, index: int) -> PlainTensor:
        """The tensor at this index of the first dimension, with one dimension less."""
        one = self.rows(index, 1)
        return PlainTensor(self.path, replace(one.stored, shape=self.shape[1:]))

    def rows(self, first: int, count: int) -> PlainTensor:
        """The tensor of some rows."""
        size = self.nbytes // self.shape[0]
        shape = (count, *self.shape[1:])
        offset = self.stored.offset + first * size
        return PlainTensor(self.path, replace(self.stored, shape=shape, offset=offset, nbytes=count * size))

    def stored_rows(self, first: int, count: int, dtype: str) -> npt.NDArray[Any]:
        """`read` for any stored dtype. dtype: a NumPy dtype of the same size as the stored one."""
        row_shape = self.shape[1:]
        size = math.prod(row_shape)
        return self.elements(first * size, count * size, dtype).reshape(count, *row_shape)

    def elements(self, first: int, count: int, dtype: str) -> npt.NDArray[Any]:
        """`stored_rows`, by elements instead of rows."""
        out = np.empty(count, dtype)
        try:
            with open_regular(self.path) as file:
                file.seek(self.stored.offset + first * out.itemsize)
                if fill(file, out) != out.nbytes:
                    raise CheckpointError(f"{self.path} became shorter while it was read")
        except OSError as error:
            raise CheckpointError(unreadable(self.path, error)) from error
        return out


def read_tensors(path: Path) -> dict[str, PlainTensor]:
    """The tensors of one file; CheckpointError if it is missing or damaged."""
    return {name: PlainTensor(path, tensor) for name, tensor in stored_tensors(path).items()}
