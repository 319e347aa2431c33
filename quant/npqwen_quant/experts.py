"""Experts of mixtures that a checkpoint stores in one tensor of three dimensions, taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError, shortened
from npqwen.format.config import Config
from npqwen_quant.recent import Recent
from npqwen_quant.tensors import CONVERTIBLE, PlainTensor, SourceTensor

_STACKED = ".mlp.switch_mlp."
_FUSED = ".mlp.experts."
_MOST = 1 << 16
"""Experts; more are not taken apart, which would take memory."""


def unstacked(stored: Mapping[str, PlainTensor], config: Config) -> dict[str, PlainTensor]:
    """Tensors of MLX, where those of a layer's experts are stacked, under the names of single experts."""
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
    """Tensors of Qwen3-VL's mixtures under the names of single experts.

    There, gate and up of all experts are one tensor (experts, hidden, 2 * inner) and down is (experts, inner, hidden):
    each matrix is transposed. What transformers saves anew is (experts, 2 * inner, hidden), (experts, hidden, inner).
    """
    found: dict[str, SourceTensor] = {}
    recent: Recent[npt.NDArray[Any]] = Recent()
    for name, tensor in tensors.items():
        layer, _, part = name.partition(_FUSED)
        if part not in ("gate_up_proj", "down_proj") or not isinstance(tensor, PlainTensor):
            found[name] = tensor
        elif part == "gate_up_proj":
            down = tensors.get(f"{layer}{_FUSED}down_proj")
            if not isinstance(down, PlainTensor):
                raise CheckpointError(f"{tensor.path} has {shortened(name)}, but no down_proj beside it")
            found |= _experts(f"{layer}.mlp.experts", tensor, down, config, recent)
        elif f"{layer}{_FUSED}gate_up_proj" not in tensors:
            raise CheckpointError(f"{tensor.path} has {shortened(name)}, but no gate_up_proj beside it")
    return found


def _experts(
    layer: str, gate_up: PlainTensor, down: PlainTensor, config: Config, recent: Recent[npt.NDArray[Any]]
) -> dict[str, SourceTensor]:
    """The matrices of a layer's experts."""
    inner, hidden = _check(f"{layer}.gate_up_proj", gate_up, config), config.hidden_size
    _check(f"{layer}.down_proj", down, config)
    shapes = gate_up.shape[1:], down.shape[1:]
    transposed = shapes == ((hidden, 2 * inner), (inner, hidden))
    if not transposed and shapes != ((2 * inner, hidden), (hidden, inner)):
        raise CheckpointError(
            f"{gate_up.path}: the experts of {shortened(layer)} have shapes {list(gate_up.shape)} and "
            f"{list(down.shape)}, but config.json says {[hidden, 2 * inner]} and {[inner, hidden]} for each"
        )
    found: dict[str, SourceTensor] = {}
    for expert in range(gate_up.shape[0]):
        both, last = gate_up.entry(expert), down.entry(expert)
        for part, whole, first, count in (
            ("gate_proj", both, 0, inner),
            ("up_proj", both, inner, inner),
            ("down_proj", last, 0, hidden),
        ):
            found[f"{layer}.{expert}.{part}.weight"] = (
                TransposedRows(whole, first, count, recent) if transposed else whole.rows(first, count)
            )
    return found


def _check(name: str, tensor: PlainTensor, config: Config) -> int:
    """The inner size of an expert. CheckpointError for a tensor that does not stack the model's experts."""
    mixture = config.mixture
    if mixture is None:
        raise CheckpointError(f"{tensor.path} has {shortened(name)}, experts that config.json does not describe")
    if len(tensor.shape) != 3 or 0 in tensor.shape or tensor.shape[0] != mixture.num_experts or tensor.shape[0] > _MOST:
        raise CheckpointError(
            f"{tensor.path}: {shortened(name)} has shape {list(tensor.shape)}; config.json has {mixture.num_experts} "
            "experts"
        )
    return mixture.moe_intermediate_size


class TransposedRows(SourceTensor):
    """Rows of a matrix that is stored transposed. All of it is in memory meanwhile: see Recent."""

    def __init__(
        self, stored: PlainTensor, first: int, count: int, recent: Recent[npt.NDArray[Any]]
    ) -> None:
        """first, count: the rows, which are columns of what is stored."""
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
            return stored.stored_rows(0, stored.shape[0], CONVERTIBLE[stored.stored.dtype])

        # gate and up have one matrix
        matrix = self._recent.get((stored.path, stored.stored.offset), load)
        start = self._first + first
        return np.ascontiguousarray(matrix[:, start : start + count].T)
