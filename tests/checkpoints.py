"""Small random Qwen3 checkpoints, written without the package safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TINY = Path(__file__).parents[1] / "examples" / "tiny-qwen3"


MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
}
"""Changes of `make_config` that make a mixture of experts, but for its first layer."""


def make_config(style: str = "hub", **changes: Any) -> dict[str, Any]:
    """A small Qwen3's config.json in the style of the hub's files ("hub") or of transformers 5 ("v5").

    Few of its sizes are multiples of 64. changes: keys to replace or add; the value None removes one.
    """
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 72,
        "intermediate_size": 100,
        "max_position_embeddings": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 203,
    }
    if style == "hub":
        config |= {"rope_theta": 10000, "rope_scaling": None, "torch_dtype": "bfloat16"}
    elif style == "v5":
        config |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    else:
        raise ValueError(style)
    config |= changes
    return {key: value for key, value in config.items() if key not in changes or value is not None}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, in the order of the hub's files."""
    hidden, head = config["hidden_size"], config["head_dim"]
    inner = config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, inner),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_norm": (head,),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (head,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.v_proj": (keys, hidden),
        }
        if config["model_type"] == "qwen3_moe" and _is_sparse(config, i):
            small, count = config["moe_intermediate_size"], config.get("num_experts") or config["num_local_experts"]
            for name in ("gate_proj", "up_proj", "down_proj"):
                del layer[f"mlp.{name}"]
            layer["mlp.gate"] = (count, hidden)
            for e in range(count):
                layer[f"mlp.experts.{e}.gate_proj"] = layer[f"mlp.experts.{e}.up_proj"] = (small, hidden)
                layer[f"mlp.experts.{e}.down_proj"] = (hidden, small)
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    out["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (config["vocab_size"], hidden)
    return out


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    only = config.get("mlp_only_layers") or []
    return layer not in only and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits (uint16) of float32 values rounded to bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as a safetensors dtype stores them: BF16 (its bits in uint16), F16 or F32."""
    if dtype == "BF16":
        return to_bf16(values)
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype])


def decode(stored: np.ndarray) -> np.ndarray:
    return from_bf16(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)


def random_tensors(config: Mapping[str, Any], dtype: str = "BF16", seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors that `dtype` can store exactly: norms near one, matrices normal over sqrt(columns)."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes(config).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        values = 1 + 0.1 * values if len(shape) == 1 else values / np.float32(np.sqrt(shape[1]))
        out[name] = decode(encode(values, dtype))
    return out


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "BF16") -> None:
    """Write float32 tensors as `dtype`, and others unchanged (uint16 as BF16, uint8 as e4m3, void bytes as U8)."""
    codes = {"uint16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64", "uint8": "F8_E4M3"}
    codes |= {"int32": "I32", "uint32": "U32", "int8": "I8", "void8": "U8"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stored, end = [], 0
    for name, values in tensors.items():
        data = encode(values, dtype) if values.dtype == np.float32 else values
        entry = {"dtype": codes[data.dtype.name], "shape": list(data.shape)}
        header[name] = entry | {"data_offsets": [end, end + data.nbytes]}
        stored.append(data)
        end += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in stored:
            file.write(np.ascontiguousarray(data).tobytes())


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: str = "BF16",
    shards: int = 1,
    tokenizer: bool = False,
) -> dict[str, np.ndarray]:
    """Write a checkpoint directory and return its tensors, as float32.

    Without `tensors`, random ones. `tokenizer` copies the example model's tokenizer, whose ids go up to
    4127: the config's `vocab_size` must then be at least 4128.
    """
    config = make_config() if config is None else config
    tensors = random_tensors(config, dtype) if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (directory / name).write_bytes((TINY / name).read_bytes())
    names = list(tensors)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
        return dict(tensors)
    weight_map: dict[str, str] = {}
    for shard, part in enumerate(np.array_split(np.arange(len(names)), shards), 1):
        file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        write_safetensors(directory / file, {names[i]: tensors[names[i]] for i in part}, dtype)
        weight_map |= {names[i]: file for i in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return dict(tensors)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file of BF16, F16, F32 or U8; bf16 as its bits, uint16."""
    dtypes = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U8": "u1"}
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        out[name] = np.frombuffer(raw[start:stop], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return out
