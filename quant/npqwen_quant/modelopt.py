"""Checkpoints of NVIDIA's Model Optimizer: NVFP4, FP8, and the Microscaling formats.

A matrix is `weight` and `weight_scale`; what they hold tells the format. NVFP4: e2m1 in bytes, scales in e4m3, which
`weight_scale_2` multiplies. MXFP4 and MXFP8: e2m1 in bytes, or e4m3, and scales in e8m0 (npqwen_quant/microscaling.py).
FP8: e4m3, and a float for the matrix, for each row, or for each block of 128 x 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from npqwen.errors import CheckpointError
from npqwen.wording import quoted
from npqwen_quant.fp8 import E8M0_TYPES, FP8, OF_ACTIVATIONS, blocks_of, check_matrix, scaled
from npqwen_quant.microscaling import MicroscaledTensor, scalar
from npqwen_quant.parts import FLOATS, Module, UnreadableError, modules
from npqwen_quant.tensors import PlainTensor, SourceTensor

CONFIG_FILE = "hf_quant_config.json"
"""The file in which older checkpoints have what others have in config.json."""
_ALGORITHMS = (
    *("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_AWQ", "MXFP4", "W4A8_MXFP4_FP8", "MXFP8"),
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_REAL", "FP8_PB_WO"),
)
_MIXED = "MIXED_PRECISION"
_BLOCK = (128, 128)
_PARTS = {"weight", "weight_scale", "weight_scale_2"}
_UNREAD = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b", "weight_scale_zero")
"""Parts that change what a matrix computes, in ways that npqwen does not read."""


@dataclass(frozen=True)
class ModelOpt:
    """`quantization_config` of a checkpoint of Model Optimizer, or its hf_quant_config.json."""

    algorithms: tuple[str, ...]

    @property
    def description(self) -> str:
        return f"ModelOpt, {' and '.join(self.algorithms) or 'nothing but keys and values'}"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> ModelOpt:
        """where: the checkpoint, for messages. CheckpointError for an impossible value or another algorithm."""
        whole = config.get("quantization")  # in a file of its own
        config = whole if isinstance(whole, dict) else config
        found = tuple(dict.fromkeys(_algorithms(config, where)))
        for algorithm in found:
            if algorithm not in _ALGORITHMS:
                raise UnreadableError(f"ModelOpt, {algorithm}")
        groups = config.get("config_groups")
        if any(map(_scales_activations, [config, *(groups.values() if isinstance(groups, dict) else ())])):
            raise UnreadableError(f"ModelOpt, {' and '.join(found)}, with scaled activations")
        return cls(found)

    def dequantized(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """The checkpoint's tensors, its quantized matrices dequantized. CheckpointError for one that is incomplete."""
        found: dict[str, SourceTensor] = {}
        for module in modules(stored):
            weight = module.parts.get("weight")
            if "weight_scale" in module or (weight is not None and weight.stored.dtype in ("U8", FP8)):
                found[module.weight] = _tensor(module)
                found |= module.others(*_PARTS, *OF_ACTIVATIONS)
            else:
                found |= module.others(*OF_ACTIVATIONS)
        return found


def _algorithms(config: Mapping[str, Any], where: str) -> Iterator[str]:
    """The algorithms that a configuration names, of all layers."""
    name = config.get("quant_algo")
    if name is None and ("kv_cache_quant_algo" in config or "kv_cache_scheme" in config):
        return  # only keys and values are quantized, while it runs
    name = _checked(name, where)
    if name != _MIXED:
        yield name
        return
    layers = config.get("quantized_layers")
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise CheckpointError(f"{where}: quantized_layers is {quoted(layers)}, not an object of layers")
    for layer in layers.values():
        yield _checked(layer.get("quant_algo"), where)


def _checked(name: Any, where: str) -> str:
    """An algorithm's name; Model Optimizer writes some in lower case."""
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: quant_algo is {quoted(name)}, not the name of an algorithm of Model Optimizer")
    return name.upper()


def _scales_activations(group: Any) -> bool:
    """Whether the activations of a group of layers are scaled, for NVFP4_AWQ or SVDQuant."""
    return isinstance(group, dict) and bool(group.get("pre_quant_scale") or group.get("lora_rank"))


def _tensor(module: Module) -> SourceTensor:
    """The weights of a quantized layer."""
    for kind in _UNREAD:
        if kind in module:
            raise module.error(kind, "is of an algorithm that npqwen does not read; use the unquantized checkpoint")
    weight = module.part("weight", ("U8", FP8))
    bits = 4 if weight.stored.dtype == "U8" else 8
    scale = module.part("weight_scale", (FP8, *E8M0_TYPES) if bits == 4 else (*FLOATS, *E8M0_TYPES), range(5))
    if scale.stored.dtype in E8M0_TYPES:
        return MicroscaledTensor(module, "weight", "weight_scale", bits, "e8m0")
    if bits == 4:
        return MicroscaledTensor(module, "weight", "weight_scale", 4, "e4m3", scalar(module, "weight_scale_2"))
    shape = check_matrix(module.weight, weight)
    down, across = blocks_of(shape, _BLOCK)
    blocks = dict.fromkeys([(down, 1, across, 1), (down, across)], _BLOCK)
    blocks |= dict.fromkeys([(shape[0],), (shape[0], 1)], (1, shape[1]))
    blocks |= dict.fromkeys([(1, 1), (1,), ()], shape)
    return scaled(module.weight, weight, scale, blocks)
