"""Checkpoints for MLX, affine: integers with a scale and a bias for each group of columns.

A matrix is `weight`, a row's integers packed one after the other into words; `scales` and `biases`, (rows, groups):
W = q * scale + bias. The embedding and the output matrix are quantized too.
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
from npqwen_quant.parts import FLOATS, Module, UnreadableError, modules, unpack
from npqwen_quant.tensors import PlainTensor, SourceTensor

_BITS = (2, 3, 4, 5, 6, 8)
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
class Mlx:
    """`quantization` of an MLX checkpoint's config.json."""

    bits: int
    group_size: int
    layers: Mapping[str, tuple[int, int]]
    """Bits and group size of layers that override the defaults."""

    @property
    def description(self) -> str:
        return f"MLX, {self.bits} bits"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Mlx:
        """where: the checkpoint, for messages. CheckpointError for an impossible value or another mode."""
        bits, size = _checked(config, where)
        layers = {name: entry for name, entry in config.items() if isinstance(entry, dict)}
        own = {text_name(name) or name: _checked({**config, **entry}, where) for name, entry in layers.items()}
        return cls(bits, size, own)

    def dequantized(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """The checkpoint's tensors, its quantized matrices dequantized. CheckpointError for one that is incomplete."""
        found: dict[str, SourceTensor] = {}
        for module in modules(stored):
            if {"scales", "biases"} & module.parts.keys():
                # A layer's experts have one entry.
                name = _EXPERT.sub(".switch_mlp.", module.name)
                found[module.weight] = MlxTensor(module, *self.layers.get(name, (self.bits, self.group_size)))
                found |= module.others("weight", "scales", "biases")
            else:
                found |= module.others()
        return found


def _checked(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Bits and group size, in the configuration of a model or a layer."""
    bits, size, mode = entry.get("bits"), entry.get("group_size", 64), entry.get("mode") or "affine"
    if mode != "affine":
        raise UnreadableError(f"MLX, {mode}")
    if type(bits) is not int:
        raise CheckpointError(f"{where}: MLX's bits are {quoted(bits)}, not a number")
    if bits not in _BITS:
        raise UnreadableError(f"MLX, {bits} bits")
    if type(size) is not int or not 0 < size < 1 << 20:
        raise CheckpointError(f"{where}: group_size is {quoted(size)}, not the number of columns of a group")
    return bits, size
