"""Checkpoints for MLX. The embedding and the output matrix are quantized too.

The mode "affine": integers with a scale and a bias for each group of columns. A matrix is `weight`, a row's integers
packed one after the other into words; `scales` and `biases`, (rows, groups): W = q * scale + bias.

The modes "nvfp4", "mxfp4" and "mxfp8": `weight`, floats in words, and `scales`, bytes (npqwen_quant/microscaling.py);
without a scale for the matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.floats import widen
from npqwen.format.text_part import text_name
from npqwen.wording import quoted
from npqwen_quant.microscaling import MicroscaledTensor, ScaleFormat
from npqwen_quant.parts import FLOATS, Module, UnreadableError, modules, unpack
from npqwen_quant.tensors import PlainTensor, SourceTensor

_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE = "affine"
_OF_FLOATS: dict[str, tuple[int, ScaleFormat]] = {"nvfp4": (4, "e4m3"), "mxfp4": (4, "e8m0"), "mxfp8": (8, "e8m0")}
"""The modes of floats: bits, and the format of the scales."""
_EXPERT = re.compile(r"\.experts\.\d+\.")

F32 = npt.NDArray[np.float32]


class MlxTensor(SourceTensor):
    """A matrix of an MLX checkpoint."""

    def __init__(self, module: Module, bits: int, group_size: int) -> None:
        """Raises CheckpointError for parts that are missing or do not fit together."""
        self._packed = module.part("weight", ("U32",))
        self._scales = module.part("scales", FLOATS)
        self._biases = module.part("biases", FLOATS)
        self._bits, self._group_size = bits, group_size
        rows, words = self._packed.shape
        groups = self._scales.shape[1]
        if words * 32 != groups * group_size * bits:
            raise module.error(
                "weight", f"has {words} words a row; {groups} groups of {group_size} integers of {bits} bits do not fit"
            )
        module.check_shape("scales", (rows, groups))
        module.check_shape("biases", (rows, groups))
        self.path = self._packed.path
        self.shape = rows, groups * group_size
        self.nbytes = self._packed.nbytes + self._scales.nbytes + self._biases.nbytes

    def read(self, first: int, count: int) -> F32:
        """See SourceTensor: float32."""
        integers = unpack(self._packed.stored_rows(first, count, "<u4"), self._bits, self.shape[1])
        values = integers.astype(np.float32)
        groups = values.reshape(count, -1, self._group_size)
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            groups *= widen(self._scales.read(first, count))[:, :, None]
            groups += widen(self._biases.read(first, count))[:, :, None]
        return values


@dataclass(frozen=True)
class _Layer:
    """How a layer is quantized."""

    mode: str
    bits: int
    group_size: int

    def tensor(self, module: Module) -> SourceTensor:
        """The weights of a layer."""
        if self.mode == _AFFINE:
            return MlxTensor(module, self.bits, self.group_size)
        return MicroscaledTensor(module, "weight", "scales", *_OF_FLOATS[self.mode])


@dataclass(frozen=True)
class Mlx:
    """`quantization` of an MLX checkpoint's config.json."""

    most: _Layer
    """How most layers are quantized."""
    others: Mapping[str, _Layer]
    """How other layers are, by their names."""

    @property
    def description(self) -> str:
        return f"MLX, {self.most.bits} bits" if self.most.mode == _AFFINE else f"MLX, {self.most.mode}"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Mlx:
        """where: the checkpoint, for messages. CheckpointError for an impossible value or another mode."""
        entries = {name: entry for name, entry in config.items() if isinstance(entry, dict)}
        # A layer's entry without a mode is affine, whatever the model's mode.
        others = {name: _layer({**config, "mode": None, **entry}, where) for name, entry in entries.items()}
        return cls(_layer(config, where), {text_name(name) or name: layer for name, layer in others.items()})

    def dequantized(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """The checkpoint's tensors, its quantized matrices dequantized. CheckpointError for one that is incomplete."""
        found: dict[str, SourceTensor] = {}
        for module in modules(stored):
            if {"scales", "biases"} & module.parts.keys():
                # A layer's experts have one entry.
                name = _EXPERT.sub(".switch_mlp.", module.name)
                found[module.weight] = self.others.get(name, self.most).tensor(module)
                found |= module.others("weight", "scales", "biases")
            else:
                found |= module.others()
        return found


def _layer(entry: Mapping[str, Any], where: str) -> _Layer:
    """The quantization that the configuration of a model or a layer describes."""
    mode, bits, size = entry.get("mode") or _AFFINE, entry.get("bits"), entry.get("group_size", 64)
    if not isinstance(mode, str) or mode not in (_AFFINE, *_OF_FLOATS):
        raise UnreadableError(f"MLX, {mode}")
    if type(bits) is not int:
        raise CheckpointError(f"{where}: MLX's bits are {quoted(bits)}, not a number")
    if bits not in _BITS:
        raise UnreadableError(f"MLX, {bits} bits")
    if type(size) is not int or not 0 < size < 1 << 20:
        raise CheckpointError(f"{where}: group_size is {quoted(size)}, not the number of columns of a group")
    return _Layer(mode, bits, size)
