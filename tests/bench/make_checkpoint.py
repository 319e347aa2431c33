#!/usr/bin/env python3
"""Write a Hugging Face style Qwen3 checkpoint with random weights, at a real model's shapes.

    python tests/bench/make_checkpoint.py 0.6B OUT [--layers N] [--shard-mb 2000] [--seed 0]

The directory has the files of the real model: config.json, generation_config.json, tokenizer files, and bf16
safetensors, sharded with an index if they are large. Speed and memory do not depend on the values of a dense model's
weights, so it stands in for the real one in benchmarks; its text is noise. In a mixture of experts the values matter:
the embedding is made large enough that tokens stay distinct through the layers and choose all experts about equally
often. Real routers prefer some experts.

The tokenizer is copied from --tokenizer (by default the small one in examples/); its vocabulary is smaller than the
embedding, as in the real models. Takes the memory of a few tensors. On disk 0.6B takes 1.2 GB, 30B-A3B 61 GB (less with
--layers).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
GENERATION = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
}


def _dense(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return COMMON | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_window_layers": layers,
        **more,
    }


def _moe(hidden: int, inner: int, expert: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sparse = MOE | {"moe_intermediate_size": expert, "num_key_value_heads": 4}
    return _dense(hidden, inner, layers, heads, **(sparse | more))


SIZES = {
    "0.6B": _dense(1024, 3072, 28, 16, tie_word_embeddings=True),
    "1.7B": _dense(2048, 6144, 28, 16, tie_word_embeddings=True),
    "4B": _dense(2560, 9728, 36, 32, tie_word_embeddings=True),
    "8B": _dense(4096, 12288, 36, 32),
    "14B": _dense(5120, 17408, 40, 40),
    "32B": _dense(5120, 25600, 64, 64),
    "30B-A3B": _moe(2048, 6144, 768, 48, 32),
    "235B-A22B": _moe(4096, 12288, 1536, 94, 64),
    "Coder-480B-A35B": _moe(
        6144,
        8192,
        2560,
        62,
        96,
        num_experts=160,
        num_key_value_heads=8,
        rope_theta=10000000,
        max_position_embeddings=262144,
    ),
}


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a model."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (queries, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        yield prefix + "self_attn.q_norm.weight", (head,)
        yield prefix + "self_attn.k_norm.weight", (head,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if config["model_type"] == "qwen3_moe":
            yield prefix + "mlp.gate.weight", (config["num_experts"], hidden)
            inner = config["moe_intermediate_size"]
            blocks = [f"{prefix}mlp.experts.{expert}." for expert in range(config["num_experts"])]
        else:
            inner = config["intermediate_size"]
            blocks = [prefix + "mlp."]
        for block in blocks:
            yield block + "gate_proj.weight", (inner, hidden)
            yield block + "up_proj.weight", (inner, hidden)
            yield block + "down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def deviation(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a matrix's values: keeps the magnitude of activations, and a mixture's tokens distinct.

    With a smaller embedding attention's mean over the past outweighs the token, and all tokens choose the same experts.
    """
    if name == "model.embed_tokens.weight" and config["model_type"] == "qwen3_moe":
        return 1.0
    return 0.7 / math.sqrt(shape[-1])


def write_values(file: BinaryIO, rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> None:
    """Write one tensor in bf16: a vector of values near 1, a matrix of normal values."""
    if len(shape) == 1:
        file.write(_bf16(1 + 0.1 * rng.standard_normal(shape, dtype=np.float32)).data)
        return
    rows, columns = shape
    step = max(1, (1 << 24) // columns)
    for row in range(0, rows, step):
        values = rng.standard_normal((min(step, rows - row), columns), dtype=np.float32)
        values *= deviation
        file.write(_bf16(values).data)


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype("<u2")


def write(config: dict[str, Any], out: Path, tokenizer: Path, shard_bytes: int, seed: int) -> None:
    """Write the checkpoint directory and print a line to stderr for every shard."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)

    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    size = total = 0
    for name, shape in tensors(config):
        count = 2 * math.prod(shape)
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape, count))
        size += count
        total += count
    rng = np.random.default_rng(seed)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        filename = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            filename = "model.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape, count in shard:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + count]}
            weight_map[name] = filename
            offset += count
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        with (out / filename).open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for name, shape, _ in shard:
                write_values(file, rng, shape, deviation(config, name, shape))
        print(f"{out / filename}  {offset / 1e9:.2f} GB", file=sys.stderr, flush=True)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=TINY, help="directory to copy the tokenizer from")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the real model's")
    parser.add_argument("--shard-mb", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = dict(SIZES[options.size])
    if options.layers:
        config["num_hidden_layers"] = config["max_window_layers"] = options.layers
    write(config, options.out, options.tokenizer, options.shard_mb << 20, options.seed)


if __name__ == "__main__":
    main()
