"""The tensors of a converted model with their encodings, in the order in which they are written to files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from npqwen.format.config import Config
from npqwen.format.encodings import Encoding
from npqwen.format.layout import Codebook, Experts, Layout, Matrix, Tensor, Vector
from npqwen.format.recipe import Recipe
from npqwen.format.safetensors import DTYPE_BYTES


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    tensor: Tensor | Codebook
    encoding: Encoding | None
    """None for a vector, which is float32."""

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> str:
        return "F32" if isinstance(self.tensor, Vector) else "U8"

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.tensor, (Vector, Codebook)):
            return self.tensor.shape
        assert self.encoding is not None
        return self.tensor.shape(self.encoding)

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors that it is made from, with their shapes."""
        return {} if isinstance(self.tensor, Codebook) else self.tensor.sources

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def matrices(self) -> Iterator[Matrix]:
        """The matrices it consists of, in the order of their bytes; none if it is a vector or a codebook."""
        if isinstance(self.tensor, Matrix):
            yield self.tensor
        elif isinstance(self.tensor, Experts):
            for expert in range(self.tensor.count):
                yield from self.tensor.matrices(expert)


def plan(config: Config, recipe: Recipe) -> list[OutputTensor]:
    """Every tensor of the converted model, in the order of its files."""
    return list(planned(config, recipe))


def planned(config: Config, recipe: Recipe) -> Iterator[OutputTensor]:
    """`plan` as an iterator: a hostile config.json may describe more tensors than fit in memory."""
    for tensor in Layout(config):
        encoding = None if isinstance(tensor, Vector) else recipe.encoding(tensor.name, config)
        if encoding is not None and encoding.codebook:
            yield OutputTensor(Codebook(tensor.name), encoding)
        yield OutputTensor(tensor, encoding)
