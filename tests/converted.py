"""Converted models written as quant/FORMAT.md says, without the converter."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TINY, make_config, to_bf16

MATRICES = ("embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")


def pack_int4(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Units (rows / 16, cols / 64, 576) of uint8 q (rows, cols), 0 to 15, and scales (rows, cols / 32)."""
    rows, cols = q.shape
    out = np.zeros((rows // 16, cols // 64, 576), np.uint8)
    out[:, :, :64] = _scales(scale)
    for block in range(2):
        for r in range(16):
            for j in range(4):
                for k in range(4):
                    low = q[r::16, 32 * block + 4 * j + k :: 64]
                    high = q[r::16, 32 * block + 16 + 4 * j + k :: 64]
                    out[:, :, 64 + 256 * block + 64 * j + 4 * r + k] = low | high << 4
    return out


def pack_int8(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Units (rows / 16, cols / 64, 1088) of int8 q (rows, cols) and scales (rows, cols / 32)."""
    rows, cols = q.shape
    out = np.zeros((rows // 16, cols // 64, 1088), np.uint8)
    out[:, :, :64] = _scales(scale)
    for block in range(2):
        for r in range(16):
            for j in range(8):
                for k in range(4):
                    values = q[r::16, 32 * block + 4 * j + k :: 64]
                    out[:, :, 64 + 512 * block + 64 * j + 4 * r + k] = values.view(np.uint8)
    return out


def pack_bf16(weights: np.ndarray) -> np.ndarray:
    """Units (rows / 16, cols / 64, 2048) of float32 weights (rows, cols), rounded."""
    rows, cols = weights.shape
    tiles = to_bf16(weights).reshape(rows // 16, 16, cols // 64, 64).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(tiles, "<u2").view(np.uint8).reshape(rows // 16, cols // 64, 2048)


def _scales(scale: np.ndarray) -> np.ndarray:
    rows, blocks = scale.shape
    turned = scale.astype("<f2").reshape(rows // 16, 16, blocks // 2, 2).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(turned).view(np.uint8).reshape(rows // 16, blocks // 2, 64)


def random_units(bits: int, real: np.ndarray, cols: int, rng: np.random.Generator) -> np.ndarray:
    """Units of random weights of about 1 / sqrt(cols); integers in their whole range, scales of either sign.

    real (a multiple of 16 rows) tells which rows are not padding.
    """
    shape = len(real), pad(cols, 64)
    if bits == 16:
        weights = rng.standard_normal(shape) / np.sqrt(cols)
        weights[~real] = weights[:, cols:] = 0
        return pack_bf16(weights)
    scale = rng.uniform(0.5, 1, (shape[0], shape[1] // 32)) * rng.choice([-1, 1], (shape[0], shape[1] // 32))
    scale[~real] = scale[:, -(-cols // 32) :] = 0
    zero = 8 if bits == 4 else 0
    q = rng.integers(0, 16, shape) if bits == 4 else rng.integers(-127, 128, shape)
    q[~real] = q[:, cols:] = zero
    if bits == 4:
        return pack_int4(q.astype(np.uint8), scale / np.sqrt(cols) / 4)
    return pack_int8(q.astype(np.int8), scale / np.sqrt(cols) / 64)


def pad(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def tensors(
    config: Mapping[str, Any],
    bits: Mapping[str, int],
    seed: int = 0,
    units: Callable[[int, np.ndarray, int, np.random.Generator], np.ndarray] = random_units,
) -> dict[str, np.ndarray]:
    """Random tensors of a converted model. bits: each matrix's encoding, by its role ("qkv_proj", ...)."""
    rng = np.random.default_rng(seed)
    hidden, dim, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    def matrix(part: str, rows: int, cols: int) -> np.ndarray:
        return units(bits[part], np.arange(pad(rows, 16)) < rows, cols, rng)

    gate_up = np.tile((np.arange(pad(inner, 16)) < inner).reshape(-1, 1, 16), (1, 2, 1)).ravel()

    def vector(size: int) -> np.ndarray:
        out = np.zeros(pad(size, 16), np.float32)
        out[:size] = 1 + 0.1 * rng.standard_normal(size)
        return out

    out = {"model.embed_tokens.weight": matrix("embed_tokens", config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        out |= {
            layer + "input_layernorm.weight": vector(hidden),
            layer + "self_attn.qkv_proj.weight": matrix("qkv_proj", queries + 2 * keys, hidden),
            layer + "self_attn.q_norm.weight": vector(dim),
            layer + "self_attn.k_norm.weight": vector(dim),
            layer + "self_attn.o_proj.weight": matrix("o_proj", hidden, queries),
            layer + "post_attention_layernorm.weight": vector(hidden),
            layer + "mlp.gate_up_proj.weight": units(bits["gate_up_proj"], gate_up, hidden, rng),
            layer + "mlp.down_proj.weight": matrix("down_proj", hidden, inner),
        }
    out["model.norm.weight"] = vector(hidden)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = matrix("lm_head", config["vocab_size"], hidden)
    return out


def write_safetensors(path: Path, values: Mapping[str, np.ndarray], **header: Any) -> dict[str, Any]:
    """Write F32 and U8 tensors as the format says, and return the header; `header` replaces entries of it."""
    head: dict[str, Any] = {"__metadata__": {"format": "npqwen", "format_version": "2"}}
    end = 0
    for name, value in values.items():
        dtype = {"float32": "F32", "float16": "F16", "uint8": "U8"}[value.dtype.name]
        entry = {"dtype": dtype, "shape": list(value.shape)}
        head[name] = entry | {"data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    head |= header
    text = json.dumps(head).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + b"".join(value.tobytes() for value in values.values())
    )
    return head


def encodings(values: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The encoding of every matrix among the tensors."""
    names = {576: "int4", 1088: "int8", 2048: "bf16"}
    return {name: names[value.shape[2]] for name, value in values.items() if value.dtype == np.uint8}


def write_model(
    directory: Path, config: Mapping[str, Any], values: Mapping[str, np.ndarray], bits: int
) -> Path:
    """Write a converted directory. Its tokenizer is the example model's, whatever the vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"quant_method": "npqwen", "format_version": 2, "bits": bits, "created_by": "a test"}
    made["encodings"] = encodings(values)
    text = json.dumps({**config, "quantization_config": made})
    (directory / "config.json").write_text(text, encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TINY / name).read_bytes())
    write_safetensors(directory / "model.safetensors", values)
    return directory


def small_model(directory: Path, bits: int = 4, **changes: Any) -> Path:
    """A random converted model with all matrices in one encoding."""
    config = make_config(**changes)
    return write_model(directory, config, tensors(config, dict.fromkeys(MATRICES, bits)), bits)


def large_model(directory: Path) -> Path:
    """A model of 140 MB in int4: random nibbles, one small scale."""

    def units(bits: int, real: np.ndarray, cols: int, rng: np.random.Generator) -> np.ndarray:
        shape = len(real) // 16, pad(cols, 64) // 64, 576
        out = rng.integers(0, 256, shape, np.uint8)
        out[:, :, :64].view("<f2")[:] = 0.2 / np.sqrt(cols)
        return out

    config = make_config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=15,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=4128,
        max_position_embeddings=8192,
    )
    return write_model(directory, config, tensors(config, dict.fromkeys(MATRICES, 4), units=units), 4)
