"""Checkpoints that are quantized already: which format a config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npqwen.errors import CheckpointError
from npqwen.wording import shortened
from npqwen_quant import modelopt
from npqwen_quant.autoround import METHODS as AUTOROUND
from npqwen_quant.autoround import OF_MLX, AutoRound
from npqwen_quant.awq import Awq
from npqwen_quant.bitsandbytes import BitsAndBytes
from npqwen_quant.compressed_tensors import CompressedTensors
from npqwen_quant.fp8 import Fp8
from npqwen_quant.gptq import Gptq
from npqwen_quant.mlx import Mlx
from npqwen_quant.modelopt import ModelOpt
from npqwen_quant.parts import UnreadableError

QuantizedFormat = AutoRound | Awq | BitsAndBytes | CompressedTensors | Fp8 | Gptq | Mlx | ModelOpt
"""A format that can be dequantized: its `description`, and `dequantized`, from stored tensors to float32 ones."""

KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that describe a quantization; the last is MLX's."""
CONFIG_FILES = {"quantize_config.json": "gptq", modelopt.CONFIG_FILE: "modelopt"}
"""Files in which old checkpoints have what others have in config.json, and the methods that they describe."""

ADVICE = "convert the unquantized checkpoint, in BF16, F16 or F32"


def format_of(
    raw_config: Mapping[str, Any],
    where: str,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    advice: str = ADVICE,
) -> QuantizedFormat | None:
    """The format of a checkpoint's weights; None if they are not quantized.

    raw_config: its config.json. where: the checkpoint, for messages. files: the content of those CONFIG_FILES that it
    has, by name. advice: what to do about a format that cannot be read. Raises CheckpointError for such a format, or
    for impossible values.
    """
    config = next((raw_config[key] for key in KEYS if raw_config.get(key)), None)
    if isinstance(config, dict) and config.get("packing_format") == OF_MLX:
        config = raw_config.get("quantization") or config
    for name, content in (files or {}).items():
        if config is None:
            config = {"quant_method": CONFIG_FILES[name], **content}
    if config is None:
        return None
    try:
        if not isinstance(config, dict):
            raise UnreadableError(str(config))
        method = config.get("quant_method")
        if method == "fp8":
            return Fp8.from_config(config, where)
        if method == "gptq":
            return Gptq.from_config(config, where)
        if method == "awq":
            return Awq.from_config(config, where)
        if method in AUTOROUND:
            return AutoRound.from_config(config, where)
        if method == "compressed-tensors":
            return CompressedTensors.from_config(config, where)
        if method == "bitsandbytes":
            return BitsAndBytes.from_config(config)
        if str(method).startswith("modelopt") or (method is None and "quant_algo" in config):
            return ModelOpt.from_config(config, where)
        if method is None and "bits" in config:
            return Mlx.from_config(config, where)
        raise UnreadableError("by an unknown method" if method is None else str(method))
    except UnreadableError as error:
        raise CheckpointError(
            f"{where} is quantized already ({shortened(str(error))}), which npqwen does not read; {advice}"
        ) from None
