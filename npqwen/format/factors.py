"""The two factors of an adapted matrix, as parts of the tensors of an adapter's file.

PEFT keeps an embedding's factors transposed. It adapts experts that transformers keeps in one parameter for a layer
(`target_parameters` of LoraConfig) with one tensor for the factors of all: A is (experts * r, columns), expert by
expert, and B (rows, r * experts), rank by rank. Before PEFT 0.19, columns and rows were those of the transposed
matrices. Source: ParamWrapper of PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from npqwen.format.safetensors import DTYPE_BYTES, StoredTensor


@dataclass(frozen=True)
class Factor:
    """Some rows and columns of a stored matrix, perhaps transposed."""

    stored: StoredTensor
    rows: range
    columns: range
    transposed: bool = False

    @classmethod
    def whole(cls, stored: StoredTensor, *, transposed: bool = False) -> Factor:
        """All of a stored matrix."""
        return cls(stored, range(stored.shape[0]), range(stored.shape[1]), transposed)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = len(self.rows), len(self.columns)
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def nbytes(self) -> int:
        return len(self.rows) * len(self.columns) * DTYPE_BYTES[self.stored.dtype]

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """A view of the stored matrix's values as this factor."""
        rows, columns = self.rows, self.columns
        chosen = values[rows.start : rows.stop : rows.step, columns.start : columns.stop : columns.step]
        return chosen.T if self.transposed else chosen


@dataclass(frozen=True)
class Factors:
    """a (r, columns) and b (rows, r) of one matrix; scale: what their product b @ a is multiplied by."""

    a: Factor
    b: Factor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the adapted matrix."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class FusedFactors:
    """Stored factors of all experts of a layer, of their gate_up_proj or of their down_proj, which the shapes tell."""

    a: StoredTensor
    b: StoredTensor
    alphas: Mapping[str, Any]
    """The lora_alpha of each, unchecked."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix of each expert, or of its transpose."""
        return self.b.shape[0], self.a.shape[1]

    def of_expert(self, expert: int, experts: int, rows: range, scale: float, *, transposed: bool) -> Factors:
        """The factors of some rows of one expert's matrix. transposed: whether they are stored as of its transpose."""
        rank = self.a.shape[0] // experts
        a = replace(Factor.whole(self.a), rows=range(expert * rank, (expert + 1) * rank))
        b = replace(Factor.whole(self.b), columns=range(expert, self.b.shape[1], experts))
        if transposed:
            return Factors(replace(b, transposed=True), replace(a, columns=rows, transposed=True), scale)
        return Factors(a, replace(b, rows=rows), scale)


def orientations(layers: Sequence[Sequence[FusedFactors]], shapes: Mapping[str, tuple[int, int]]) -> list[bool]:
    """How the factors of fused experts may be stored, by their shapes: False as of the matrices, True as of the
    transposed ones.

    layers: the factors of each layer, at most one of each parameter. shapes: of an expert's part of the parameters.
    """
    possible = []
    for transposed in (False, True):
        known = {shape[::-1] if transposed else shape for shape in shapes.values()}
        if all(len({one.shape for one in layer} & known) == len(layer) for layer in layers):
            possible.append(transposed)
    return possible
