"""GGUF files: written by hand, and llama.cpp's own of the tiny models, of which only the headers are kept."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TINY, make_config, random_tensors, read_safetensors

DATA = Path(__file__).parent / "data"
MOE = DATA / "tiny-qwen3-moe"
LLAMA = np.load(DATA / "from-llama" / "llama.npz")
"""See data/make_gguf.py."""

NUMBERS = {
    "F32": 0,
    "F16": 1,
    "BF16": 30,
    "Q8_0": 8,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "MXFP4": 39,
}
QUANTIZED = [name for name in NUMBERS if name not in ("F32", "F16", "BF16")]

_PLACES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""By name: type, shape (the rows' length last) and data."""


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str, value: Any) -> bytes:
    """A key and a value, whose type follows from Python's: numbers are u32 or f32, arrays of numbers i32."""
    head = string(key)
    if isinstance(value, bytes):  # made by hand: type and value
        return head + value
    if isinstance(value, str):
        return head + struct.pack("<I", 8) + string(value)
    if isinstance(value, bool):
        return head + struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return head + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return head + struct.pack("<If", 6, value)
    if value and isinstance(value[0], str):
        return head + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    return head + struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def encode(metadata: Mapping[str, Any], tensors: Tensors, *, version: int = 3, alignment: int = 32) -> bytes:
    """A whole file."""
    infos, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos += string(name) + sizes + struct.pack("<IQ", NUMBERS[kind], len(data))
        data += content + bytes(-len(content) % alignment)
    entries = b"".join(entry(key, value) for key, value in metadata.items())
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + entries + infos
    return head + bytes(-len(head) % alignment) + data


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of Qwen3ForCausalLM, experts without their numbers."""
    module = name.removesuffix(".weight")
    if module.startswith("model.layers."):
        layer, _, rest = module.removeprefix("model.layers.").partition(".")
        parts = [part for part in rest.split(".") if not part.isdecimal()]
        return f"blk.{layer}.{_PLACES['.'.join(parts)]}.weight"
    return f"{_PLACES[module]}.weight"


def stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint under GGUF's names, experts stacked."""
    found: dict[str, list[np.ndarray]] = {}
    for name, values in tensors.items():
        found.setdefault(gguf_name(name), []).append(values)
    return {name: np.stack(values) if "_exps" in name else values[0] for name, values in found.items()}


def rebuilt(name: str, place: Path) -> Path:
    """llama.cpp's F16 file of "tiny-qwen3", or its BF16 file of "tiny-qwen3-moe": its header, and the data again."""
    stored = stacked(_checkpoint(TINY if name == "tiny-qwen3" else MOE))
    floats = {tensor: (bits.astype(np.uint32) << 16).view(np.float32) for tensor, bits in stored.items()}
    return rebuilt_of(name, floats, place)


def rebuilt_of(name: str, tensors: Mapping[str, np.ndarray], place: Path) -> Path:
    """llama.cpp's file: the header of this name, and data of float32 tensors, which are exactly what it holds."""
    from npqwen_quant.gguf_header import read_header

    header = gzip.decompress((DATA / "from-llama" / f"{name}.header.gz").read_bytes())
    path = place / f"{name}.gguf"
    with path.open("w+b") as file:
        file.write(header)
        file.truncate(len(header) + 20_000_000)
        file.flush()
        located = read_header(path).tensors
        assert located.keys() == tensors.keys()
        end = 0
        for tensor, floats in tensors.items():
            stored = located[tensor]
            bits = (floats.view(np.uint32) >> 16).astype("<u2")
            data = {"F32": floats, "F16": floats.astype("<f2"), "BF16": bits}[stored.kind.name]
            assert stored.shape == floats.shape, tensor
            file.seek(stored.offset)
            file.write(np.ascontiguousarray(data).tobytes())
            end = max(end, stored.offset + stored.nbytes)
        file.truncate(end)
    return path


def _checkpoint(directory: Path) -> dict[str, np.ndarray]:
    return {name: values for path in directory.glob("*.safetensors") for name, values in read_safetensors(path).items()}


TOKENS = [*(chr(letter) for letter in range(33, 127)), "Ġ", "Ċ", "ab", "Ġab"]
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<think>"]
VOCABULARY = 110


def metadata(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The entries of a model of a config.json, with a small tokenizer. changes: with "__" for "."; None removes one."""
    arch = "qwen3moe" if config["model_type"] == "qwen3_moe" else "qwen3"
    tokens = TOKENS + SPECIAL
    padding = [f"[PAD{id}]" for id in range(len(tokens), config["vocab_size"])]
    found: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": config["head_dim"],
        f"{arch}.attention.value_length": config["head_dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": float(config["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.token_type": [1] * len(TOKENS) + [3, 3, 4] + [5] * len(padding),
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    if arch == "qwen3moe":
        found |= {
            f"{arch}.expert_count": config["num_experts"],
            f"{arch}.expert_used_count": config["num_experts_per_tok"],
            f"{arch}.expert_feed_forward_length": config["moe_intermediate_size"],
        }
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}


def config(**changes: Any) -> dict[str, Any]:
    """A config.json of a model with rows of whole blocks."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "vocab_size": VOCABULARY}
    return make_config(**sizes | changes)


def quantized(kind: str, config: Mapping[str, Any]) -> tuple[Tensors, dict[str, np.ndarray]]:
    """Tensors of a model, all matrices of ggml's blocks of a kind; and their float32 values, by the checkpoint's
    names."""
    blocks, weights = LLAMA[f"{kind}.blocks"], LLAMA[f"{kind}.weights"]
    plain = random_tensors(config, "F32")
    floats = {}
    for i, (name, values) in enumerate(plain.items()):
        count = values.size // weights.shape[1]
        chosen = (np.arange(count) * 7 + i) % len(blocks)
        floats[name] = values if values.ndim == 1 else weights[chosen].reshape(values.shape)
    tensors: Tensors = {}
    order = list(plain)
    for name, values in stacked(floats).items():
        if values.ndim == 1:
            tensors[name] = "F32", values.shape, values.tobytes()
            continue
        data = b""
        for i in (i for i, original in enumerate(order) if gguf_name(original) == name):
            count = plain[order[i]].size // weights.shape[1]
            data += blocks[(np.arange(count) * 7 + i) % len(blocks)].tobytes()
        tensors[name] = kind, values.shape, data
    return tensors, floats


def plain(config: Mapping[str, Any], kind: str = "BF16") -> tuple[Tensors, dict[str, np.ndarray]]:
    """Tensors of a model, matrices of floats of a kind and vectors in F32, and their float32 values."""
    floats = random_tensors(config, "BF16")
    tensors: Tensors = {}
    for name, values in stacked(floats).items():
        bits = (values.view(np.uint32) >> 16).astype("<u2")
        data = {"BF16": bits, "F16": values.astype("<f2"), "F32": values}[kind if values.ndim > 1 else "F32"]
        tensors[name] = kind if values.ndim > 1 else "F32", values.shape, data.tobytes()
    return tensors, floats


def write(path: Path, **changes: Any) -> Path:
    """A small model in one BF16 file. changes: of its metadata."""
    small = config(num_hidden_layers=1)
    path.write_bytes(encode(metadata(small, **changes), plain(small)[0]))
    return path


def write_shards(place: Path, count: int = 3) -> list[Path]:
    """A small model in several files."""
    small = config(num_hidden_layers=1)
    tensors = list(plain(small)[0].items())
    paths = []
    for i in range(count):
        split = {"split__no": struct.pack("<IH", 2, i), "split__count": struct.pack("<IH", 2, count)}
        split["split__tensors__count"] = struct.pack("<Ii", 5, len(tensors))
        entries = metadata(small, **split) if i == 0 else {key.replace("__", "."): v for key, v in split.items()}
        paths.append(place / f"small-{i + 1:05d}-of-{count:05d}.gguf")
        paths[-1].write_bytes(encode(entries, dict(tensors[i::count])))
    return paths


