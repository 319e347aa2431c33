"""AutoRound checkpoints (Intel): which of the other formats their matrices are stored in.

`packing_format` names it. With GPTQ in the name it is GPTQ's first format, without g_idx; with GPTQModel, or no other
name than AutoRound's, its second, whose zeros are stored as they are; with AWQ, AWQ. Integers have 2 to 8 bits. Floats
are stored as in compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npqwen.errors import CheckpointError
from npqwen.wording import quoted
from npqwen_quant.awq import BITS as AWQ_BITS
from npqwen_quant.awq import Awq
from npqwen_quant.compressed_tensors import CompressedTensors
from npqwen_quant.fp8 import Fp8
from npqwen_quant.gptq import Gptq
from npqwen_quant.parts import UnreadableError, check_group_size
from npqwen_quant.tensors import PlainTensor, SourceTensor

METHODS = ("auto-round", "intel/auto-round")
"""Values of quant_method."""
OF_MLX = "mlx"
"""The packing format of checkpoints that describe themselves as MLX's do, too."""
_BITS = range(2, 9)
_FLOATS = ("fp", "nv_fp", "mx_fp")
_KEYS = {"rotation_config": "rotated", "super_group_size": "groups of groups"}
"""Keys of what npqwen does not read."""


@dataclass(frozen=True)
class AutoRound:
    """`quantization_config` of an AutoRound checkpoint."""

    stored_as: Awq | CompressedTensors | Fp8 | Gptq
    description: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> AutoRound:
        """where: the checkpoint, for messages. CheckpointError for an impossible value or another packing format."""
        kind, bits = config.get("data_type") or "int", config.get("bits")
        packing = config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq"
        if type(bits) is not int or bits not in _BITS:
            raise CheckpointError(f"{where}: AutoRound's bits are {quoted(bits)}; npqwen reads 2 to 8")
        for key, name in _KEYS.items():
            if config.get(key):
                raise UnreadableError(f"AutoRound, {name}")
        if not isinstance(kind, str) or not isinstance(packing, str) or "e5m3" in f"{kind} {packing}":
            raise UnreadableError(f"AutoRound, {kind}, {packing}")
        if kind == "fp" and config.get("weight_block_size"):
            return cls(Fp8.from_config(config, where), f"AutoRound, {kind}")
        if kind.startswith(_FLOATS) and bits in (4, 8):
            return cls(CompressedTensors((), (), ""), f"AutoRound, {kind}")
        if kind != "int" or not packing.startswith("auto_round"):
            raise UnreadableError(f"AutoRound, {kind}, {packing}")
        description = f"AutoRound, {bits} bits"
        size, *others = _group_sizes(config, where)
        if "awq" in packing:
            if bits != AWQ_BITS:
                raise UnreadableError(f"AutoRound, {bits} bits, {packing}")
            return cls(Awq(size, tuple(others)), description)
        layout = "gptq" if "gptq" in packing and "gptqmodel" not in packing else "gptq_v2"
        return cls(Gptq(bits, size, layout, tuple(_BITS), tuple(others)), description)

    def dequantized(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """The checkpoint's tensors, its quantized matrices dequantized. CheckpointError for one that is incomplete."""
        return self.stored_as.dequantized(stored)


def _group_sizes(config: Mapping[str, Any], where: str) -> list[int]:
    """The group size of most layers, then those of others."""
    layers = config.get("extra_config") or {}
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise CheckpointError(f"{where}: extra_config is {quoted(layers)}, not an object of layers")
    found = [config.get("group_size", -1), *(layer.get("group_size") for layer in layers.values())]
    sizes = [size for size in found if size is not None]
    for size in sizes:
        check_group_size(size, where)
    return list(dict.fromkeys(sizes))
