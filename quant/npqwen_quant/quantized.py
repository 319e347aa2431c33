"""Checkpoints that are quantized already: which format a config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npqwen.errors import CheckpointError, shortened
from npqwen_quant.fp8 import Fp8

QuantizedFormat = Fp8
"""A format that can be dequantized: its `description`, and `dequantized`, from stored tensors to float32 ones."""

KEYS = ("quantization_config", "compression_config", "quantization")
"""Of config.json; the last is MLX's."""

ADVICE = "convert the unquantized checkpoint, in BF16, F16 or F32"


def format_of(raw_config: Mapping[str, Any], where: str, advice: str = ADVICE) -> QuantizedFormat | None:
    """The format of a checkpoint's weights; None if they are not quantized.

    raw_config: its config.json. where: the checkpoint, for messages. advice: what to do about a format that cannot be
    read. Raises CheckpointError for such a format, or for impossible values.
    """
    config = next((raw_config[key] for key in KEYS if raw_config.get(key)), None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config
    if isinstance(config, dict) and method == "fp8":
        return Fp8.from_config(config, where)
    if isinstance(config, dict) and method is None and config.get("bits") is not None:
        method = f"MLX, {config['bits']} bits"
    raise CheckpointError(
        f"{where} is quantized already ({shortened(str(method))}), which npqwen does not read; {advice}"
    )
