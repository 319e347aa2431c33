"""Converted models written as quant/FORMAT.md says, without the converter."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TINY, make_config, to_bf16
from units import CODEBOOKS, PLANES, Units, name_of, row_bytes, unit_bytes

MATRICES = ("embed_tokens", "qk_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")


def pack(encoding: str, q: np.ndarray, scales: np.ndarray, row_scales: np.ndarray, codebook: Any = None) -> Units:
    """A stored matrix of integers q (rows, columns), int8 scales (rows, columns / 32) and float32 row_scales (rows,).

    codebook: the values of q, plus 32; repeated here.
    """
    rows, columns = q.shape
    planes = PLANES[encoding]
    shape = rows // 16, columns // 128
    quads = q.astype(np.uint8).reshape(shape[0], 16, shape[1], 4, 8, 4).transpose(0, 2, 3, 4, 1, 5)
    quads = quads.reshape(*shape, 4, 8, 64)
    blocks = np.zeros((*shape, 4, sum(planes), 64), np.uint8)
    for n in range(8):
        line, at = 0, 0
        for p in planes:
            blocks[:, :, :, line + n % p] |= (quads[:, :, :, n] >> at & (1 << p) - 1) << n // p * p
            line, at = line + p, at + p
    stored = scales.astype(np.int8).reshape(shape[0], 16, shape[1], 4).transpose(0, 2, 3, 1).reshape(*shape, 64)
    units = np.concatenate([stored.view(np.uint8), blocks.reshape(*shape, -1)], 2).reshape(shape[0], -1)
    head = np.ascontiguousarray(row_scales.astype("<f4").reshape(-1, 16)).view(np.uint8)
    table = None if codebook is None else np.resize(np.asarray(codebook, np.uint8), 64)
    return Units(encoding, np.concatenate([head, units], 1), table)


def pack_bf16(weights: np.ndarray) -> Units:
    """A stored matrix of float32 weights (rows, columns), rounded."""
    rows, cols = weights.shape
    tiles = to_bf16(weights).reshape(rows // 16, 16, cols // 128, 128).transpose(0, 2, 3, 1)
    return Units("bf16", np.ascontiguousarray(tiles, "<u2").view(np.uint8).reshape(rows // 16, -1))


def random_units(bits: int, real: np.ndarray, cols: int, rng: np.random.Generator) -> Units:
    """A stored matrix of random weights of about 1 / sqrt(cols): integers in their whole range, both signs of scales.

    real (a multiple of 16 rows) tells which rows are not padding. Columns of padding hold anything beside others.
    """
    rows, columns = len(real), pad(cols, 128)
    encoding = name_of(bits)
    if encoding == "bf16":
        weights = rng.standard_normal((rows, columns)) / np.sqrt(cols)
        weights[~real] = weights[:, cols:] = 0
        return pack_bf16(weights)
    size = CODEBOOKS.get(encoding)
    codebook = None if size is None else np.sort(rng.permutation(64)[:size])
    scales = rng.integers(64, 128, (rows, columns // 32)) * rng.choice([-1, 1], (rows, columns // 32))
    scales[~real] = scales[:, -(-cols // 32) :] = 0
    q = rng.integers(-127, 128, (rows, columns)) if bits == 8 else rng.integers(0, 1 << bits, (rows, columns))
    row_scales = rng.uniform(0.5, 1, rows) / np.sqrt(cols) / 96 / (16 if bits < 8 else 64)
    row_scales[~real] = 0
    return pack(encoding, q, scales, row_scales, codebook)


def pad(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def tensors(
    config: Mapping[str, Any],
    bits: Mapping[str, int],
    seed: int = 0,
    units: Callable[[int, np.ndarray, int, np.random.Generator], Units] = random_units,
) -> dict[str, np.ndarray]:
    """Random tensors of a converted model. bits: each matrix's encoding, by its role ("qk_proj", ...)."""
    rng = np.random.default_rng(seed)
    hidden, dim, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    out: dict[str, np.ndarray] = {}

    def matrix(name: str, real: np.ndarray, cols: int) -> None:
        stored = units(bits[name.split(".")[-1]], real, cols, rng)
        if stored.codebook is not None:
            out[name + ".codebook"] = stored.codebook
        out[name + ".weight"] = stored.rows

    def real(rows: int) -> np.ndarray:
        found: np.ndarray = np.arange(pad(rows, 16)) < rows
        return found

    gate_up = np.tile(real(inner).reshape(-1, 1, 16), (1, 2, 1)).ravel()

    def vector(size: int) -> np.ndarray:
        out = np.zeros(pad(size, 16), np.float32)
        out[:size] = 1 + 0.1 * rng.standard_normal(size)
        return out

    matrix("model.embed_tokens", real(config["vocab_size"]), hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        out[layer + "input_layernorm.weight"] = vector(hidden)
        matrix(layer + "self_attn.qk_proj", real(queries + keys), hidden)
        matrix(layer + "self_attn.v_proj", real(keys), hidden)
        out[layer + "self_attn.q_norm.weight"] = vector(dim)
        out[layer + "self_attn.k_norm.weight"] = vector(dim)
        matrix(layer + "self_attn.o_proj", real(hidden), queries)
        out[layer + "post_attention_layernorm.weight"] = vector(hidden)
        matrix(layer + "mlp.gate_up_proj", gate_up, hidden)
        matrix(layer + "mlp.down_proj", real(hidden), inner)
    out["model.norm.weight"] = vector(hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", real(config["vocab_size"]), hidden)
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


def encodings(config: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The encoding of every matrix among the tensors, which its width tells."""
    widths = {"o_proj": config["num_attention_heads"] * config["head_dim"], "down_proj": config["intermediate_size"]}
    found = {}
    for name, value in values.items():
        if value.dtype == np.uint8 and name.endswith(".weight"):
            units = pad(widths.get(name.split(".")[-2], config["hidden_size"]), 128) // 128
            found[name] = {row_bytes(e, units): e for e in ("bf16", *PLANES)}[value.shape[1]]
    return found


def write_model(
    directory: Path, config: Mapping[str, Any], values: Mapping[str, np.ndarray], bits: int
) -> Path:
    """Write a converted directory. Its tokenizer is the example model's, whatever the vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"quant_method": "npqwen", "format_version": 2, "bits": bits, "created_by": "a test"}
    made["encodings"] = encodings(config, values)
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

    def units(bits: int, real: np.ndarray, cols: int, rng: np.random.Generator) -> Units:
        shape = len(real) // 16, row_bytes("int4", pad(cols, 128) // 128)
        out = rng.integers(0, 256, shape, np.uint8)
        out[:, :64].view("<f4")[:] = 0.2 / np.sqrt(cols) / 512
        out[:, 64:].reshape(len(out), -1, unit_bytes("int4"))[:, :, :64] = 64
        return Units("int4", out, np.resize(np.arange(0, 64, 4, dtype=np.uint8), 64))

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
