"""Splitting the tensors of three dimensions in which some checkpoints store all experts of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.config import Config
from npqwen.format.floats import DTYPES
from npqwen.format.fused_experts import FUSED, fused_shapes
from npqwen.wording import shortened
from npqwen_quant.recent import Recent
from npqwen_quant.tensors import PlainTensor, SourceTensor

_STACKED = ".mlp.switch_mlp."
_EXPERTS = ".mlp.experts."
_OTHER = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}
_MOST = 1 << 16
"""Most experts of a layer that are split, to bound memory."""
_MOST_NAMES = 1 << 21


def names_of_singles(names: Iterable[str], config: Config) -> dict[str, tuple[str, ...]]:
    """For each name of a stored tensor, the names of the tensors it becomes: those of all experts if it stacks them.

    If it takes both fused tensors of a layer to tell how they are stored, each has the names that both become. Raises
    CheckpointError for so many experts that their names might not fit in memory.
    """
    count = 0 if config.mixture is None else config.mixture.num_experts
    both = tuple(part for parts in FUSED.values() for part in parts)
    found: dict[str, tuple[str, ...]] = {}
    total = 0
    for name in names:
        layer, stacked, after = name.partition(_STACKED)
        parts: tuple[str, ...] = (after,) if stacked else ()
        if not stacked:
            layer, _, fused = name.partition(_EXPERTS)
            own = both if _ambiguous(config) else FUSED.get(fused, ())
            parts = tuple(f"{part}.weight" for part in own) if fused in FUSED else ()
        total += count * len(parts)
        if total > _MOST_NAMES:
            raise CheckpointError(f"config.json's num_experts, {count}, is more than any model has")
        singles = (f"{layer}{_EXPERTS}{expert}.{part}" for part in parts for expert in range(count))
        found[name] = tuple(singles) or (name,)
    return found


def unstacked(stored: Mapping[str, PlainTensor], config: Config) -> dict[str, PlainTensor]:
    """Tensors of MLX, which stacks those of a layer's experts, under the names of single experts."""
    found: dict[str, PlainTensor] = {}
    for name, tensor in stored.items():
        before, stacked, after = name.partition(_STACKED)
        if not stacked:
            found[name] = tensor
            continue
        _check(name, tensor, config)
        for expert in range(tensor.shape[0]):
            found[f"{before}.mlp.experts.{expert}.{after}"] = tensor.entry(expert)
    return found


def unfused(tensors: Mapping[str, SourceTensor], config: Config) -> dict[str, SourceTensor]:
    """Tensors of the mixtures of Qwen3-VL and Qwen3.5 under the names of single experts.

    Gate and up of all experts are one tensor (experts, 2 * inner, hidden), down is (experts, hidden, inner). Qwen3-VL's
    are (experts, hidden, 2 * inner) and (experts, inner, hidden): each matrix is transposed. For square matrices, the
    shape of the layer's other tensor tells whether they are transposed; then it must be there.
    """
    found: dict[str, SourceTensor] = {}
    recent: Recent[npt.NDArray[Any]] = Recent()
    for name, tensor in tensors.items():
        layer, _, part = name.partition(_EXPERTS)
        if part not in FUSED or not isinstance(tensor, PlainTensor):
            found[name] = tensor
            continue
        transposed = _is_transposed(name, tensor, config)
        if transposed is None:
            beside = f"{layer}{_EXPERTS}{_OTHER[part]}"
            other = tensors.get(beside)
            if not isinstance(other, PlainTensor):
                raise CheckpointError(f"{tensor.path} has {shortened(name)}, but no {_OTHER[part]} beside it")
            transposed = bool(_is_transposed(beside, other, config))
        rows = tensor.shape[2 if transposed else 1] // len(FUSED[part])
        for expert in range(tensor.shape[0]):
            matrix = tensor.entry(expert)
            for i, each in enumerate(FUSED[part]):
                found[f"{layer}{_EXPERTS}{expert}.{each}.weight"] = (
                    TransposedRows(matrix, i * rows, rows, recent) if transposed else matrix.rows(i * rows, rows)
                )
    return found


def _ambiguous(config: Config) -> bool:
    """Whether the matrices of one of a layer's fused tensors are square: then its shape does not tell whether they are
    transposed."""
    return any(rows == columns for rows, columns in fused_shapes(config).values())


def _is_transposed(name: str, tensor: PlainTensor, config: Config) -> bool | None:
    """Whether a fused tensor's matrices are transposed; None if they are square. CheckpointError for other shapes.

    The matrices of gate_up_proj and of down_proj cannot both be square.
    """
    _check(name, tensor, config)
    shape = fused_shapes(config)[name.rpartition(".")[2]]
    if tensor.shape[1:] not in (shape, shape[::-1]):
        raise CheckpointError(
            f"{tensor.path}: {shortened(name)} has shape {list(tensor.shape)}, but config.json says "
            f"{[tensor.shape[0], *shape]}"
        )
    return None if shape[0] == shape[1] else tensor.shape[1:] != shape


def _check(name: str, tensor: PlainTensor, config: Config) -> None:
    """Raise CheckpointError for a tensor that does not stack the model's experts."""
    mixture = config.mixture
    if mixture is None:
        raise CheckpointError(f"{tensor.path} has {shortened(name)}, experts that config.json does not describe")
    if len(tensor.shape) != 3 or 0 in tensor.shape or tensor.shape[0] != mixture.num_experts or tensor.shape[0] > _MOST:
        raise CheckpointError(
            f"{tensor.path}: {shortened(name)} has shape {list(tensor.shape)}; config.json has {mixture.num_experts} "
            "experts"
        )


class TransposedRows(SourceTensor):
    """Rows of a matrix that is stored transposed. All of it is kept in memory for a while: see Recent."""

    def __init__(
        self, stored: PlainTensor, first: int, count: int, recent: Recent[npt.NDArray[Any]]
    ) -> None:
        """first, count: the rows, which are columns of the stored matrix."""
        self.path = stored.path
        self.shape = count, stored.shape[0]
        self.nbytes = stored.nbytes // stored.shape[1] * count
        self._stored, self._first, self._recent = stored, first, recent

    def check(self, name: str) -> None:
        """See SourceTensor."""
        self._stored.check(name)

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """See SourceTensor."""
        stored = self._stored

        def load() -> npt.NDArray[Any]:
            return stored.stored_rows(0, stored.shape[0], DTYPES[stored.stored.dtype])

        # gate and up share one stored matrix
        matrix = self._recent.get((stored.path, stored.stored.offset), load)
        start = self._first + first
        return np.ascontiguousarray(matrix[:, start : start + count].T)
