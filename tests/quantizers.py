"""Checkpoints that are quantized already, made by hand from the definition of each format, with what they mean.

A quantizer takes a matrix and gives the parts that are stored in its place, by the ends of their names, and the float32
weights that these mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TINY, from_bf16, to_bf16, write_checkpoint

Quantizer = Callable[[np.ndarray], tuple[dict[str, np.ndarray], np.ndarray]]
UNQUANTIZED = ("embed_tokens", "lm_head", "mlp.gate.")
MOE = Path(__file__).parent / "data" / "tiny-qwen3-moe"


def e4m3(code: int) -> float:
    """The value of a byte of float8 e4m3fn (Micikevicius et al. 2022), digit by digit."""
    bits = f"{code:08b}"
    sign, exponent, mantissa = 1 - 2 * int(bits[0]), int(bits[1:5], 2), int(bits[5:], 2)
    if bits[1:] == "1111111":
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(code) for code in range(256)], np.float32)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """The codes (uint8) of the nearest values."""
    order = np.argsort(E4M3[:127])
    rising = E4M3[:127][order]
    middles = (rising[1:] + rising[:-1]) / 2
    codes: np.ndarray = order[np.searchsorted(middles, np.abs(values))]
    return np.where(values < 0, codes + 128, codes).astype(np.uint8)


def fp8(weights: np.ndarray, block: tuple[int, int] = (128, 128), bf16: bool = False) -> Any:
    """Fine-grained FP8. bf16: of the scales."""
    rows, columns = weights.shape
    scales = np.zeros((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    codes, meant = np.zeros(weights.shape, np.uint8), np.zeros(weights.shape, np.float32)
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale = np.abs(weights[part]).max(initial=1e-9) / np.float32(448)
            scales[i, j] = from_bf16(to_bf16(scale)).item() if bf16 else scale
            codes[part] = to_e4m3(weights[part] / scales[i, j])
            meant[part] = E4M3[codes[part]] * scales[i, j]
    return {"weight": codes, "weight_scale_inv": to_bf16(scales) if bf16 else scales}, meant


def write_quantized(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantizer: Quantizer,
    *,
    plain: tuple[str, ...] = UNQUANTIZED,
    rename: Callable[[str], str] = str,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Write a checkpoint with its matrices quantized, and return what its tensors mean.

    plain: parts of the names of matrices that stay BF16. rename: makes the names in the files. options: of
    write_checkpoint.
    """
    stored: dict[str, np.ndarray] = {}
    meant = {}
    for name, values in tensors.items():
        if values.ndim == 1 or any(part in name for part in plain):
            stored[rename(name)], meant[name] = to_bf16(values), from_bf16(to_bf16(values))
            continue
        parts, meant[name] = quantizer(values)
        stored |= {rename(name).removesuffix("weight") + end: part for end, part in parts.items()}
    write_checkpoint(directory, config, stored, dtype="F32", **options)
    return meant


def example(source: Path = TINY) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and tensors of the example model, or of the trained mixture (MOE)."""
    from reference import read_safetensors

    weights = {}
    for name, values in read_safetensors(source / "model.safetensors").items():
        weights[name] = np.asarray(values, np.float32)
    return json.loads((source / "config.json").read_text()), weights


def check_tensors(directory: Path, meant: Mapping[str, np.ndarray]) -> None:
    """Every tensor of a checkpoint, read in parts, is what it means."""
    from npqwen_quant.checkpoint import Checkpoint

    tensors = Checkpoint(directory).tensors
    assert tensors.keys() == meant.keys()
    for name, values in meant.items():
        assert tensors[name].shape == values.shape
        for first, last in ((0, 1), (1, 18), (18, len(values)), (0, len(values))):
            count = min(last, len(values)) - first
            if count > 0:
                np.testing.assert_array_equal(tensors[name].floats(first, count), values[first : first + count])
        assert tensors[name].nbytes > 0


def check_conversion(source: Path, out: Path, meant: Mapping[str, np.ndarray]) -> None:
    """Converted to 16 bits, a checkpoint gives the logits of what its tensors mean, rounded to bf16."""
    from npqwen_quant import convert
    from reference import ReferenceModel

    import npqwen
    from npqwen.format.config import Config

    convert(source, out, bits=16)
    ids = np.random.default_rng(0).integers(0, 4096, 40)
    rounded = {name: from_bf16(to_bf16(values)) for name, values in meant.items()}
    want = ReferenceModel(Config.from_directory(out), rounded).logits(ids)
    with npqwen.load(out, threads=1) as model:
        np.testing.assert_allclose(model.logits(ids), want, rtol=0, atol=1e-3 * np.abs(want).max())
