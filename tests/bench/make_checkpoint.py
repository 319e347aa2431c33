#!/usr/bin/env python3
"""Write a Hugging Face style Qwen3 checkpoint with random weights, at a real model's shapes.

    python tests/bench/make_checkpoint.py 0.6B OUT [--layers N] [--shard-mb 2000] [--seed 0]
    python tests/bench/make_checkpoint.py 30B-A3B OUT --convert 3
    python tests/bench/make_checkpoint.py 3.5-4B OUT

The directory has the files of the real model: config.json, generation_config.json, tokenizer files, and bf16
safetensors, sharded with an index if they are large. Speed and memory do not depend on the values of a dense model's
weights, so it stands in for the real one in benchmarks; its text is noise. In a mixture of experts the values matter:
the embedding is made large enough that tokens stay distinct through the layers and choose all experts about equally
often. Real routers prefer some experts.

The tokenizer is copied from --tokenizer (by default the small one in examples/); its vocabulary is smaller than the
embedding, as in the real models. On disk 0.6B takes 1.2 GB, 30B-A3B 61 GB (less with --layers).

With --convert BITS, OUT is a converted model instead, made as by `npqwen convert --low-disk`: each file of weights is
generated when it would be downloaded, and removed when it is converted, so that the disk holds one at a time. The same
command resumes an interrupted conversion. Prints seconds and peaks of memory and disk. Not on Windows.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
HYBRID = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "bos_token_id": None,
    "eos_token_id": 248046,
    "full_attention_interval": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "vocab_size": 248320,
}
HYBRID_MOE = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "num_experts": 256,
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


def _hybrid(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, values: int, **more: Any
) -> dict[str, Any]:
    """values: the value heads of Gated DeltaNet layers."""
    types = ["linear_attention" if (layer + 1) % 4 else "full_attention" for layer in range(layers)]
    own = {"num_key_value_heads": kv_heads, "linear_num_value_heads": values, "layer_types": types}
    config = _dense(hidden, inner, layers, heads, **(HYBRID | own | more))
    return {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}


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
    "3.5-0.8B": _hybrid(1024, 3584, 24, 8, 2, 16, tie_word_embeddings=True),
    "3.5-2B": _hybrid(2048, 6144, 24, 8, 2, 16, tie_word_embeddings=True),
    "3.5-4B": _hybrid(2560, 9216, 32, 16, 4, 32, tie_word_embeddings=True),
    "3.5-9B": _hybrid(4096, 12288, 32, 16, 4, 32),
    "3.5-27B": _hybrid(5120, 17408, 64, 24, 4, 48),
    "3.5-35B-A3B": _hybrid(
        2048, 512, 40, 16, 2, 32, **HYBRID_MOE, moe_intermediate_size=512, shared_expert_intermediate_size=512
    ),
}


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a model."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        yield from _layer(config, f"model.layers.{layer}.", is_recurrent(config, layer))
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)
    if config.get("mtp_num_hidden_layers"):
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield f"mtp.{name}.weight", (hidden,)
        yield "mtp.fc.weight", (hidden, 2 * hidden)
        yield from _layer(config, "mtp.layers.0.", False)


def _layer(config: dict[str, Any], prefix: str, recurs: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a layer."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield prefix + "input_layernorm.weight", (hidden,)
    if recurs:
        yield from ((f"{prefix}linear_attn.{name}", shape) for name, shape in recurrent(config))
    else:
        gated = 2 if "linear_num_value_heads" in config else 1
        yield prefix + "self_attn.q_proj.weight", (gated * queries, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        yield prefix + "self_attn.q_norm.weight", (head,)
        yield prefix + "self_attn.k_norm.weight", (head,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    if "num_experts" in config:
        yield prefix + "mlp.gate.weight", (config["num_experts"], hidden)
        inner = config["moe_intermediate_size"]
        blocks = [f"{prefix}mlp.experts.{expert}." for expert in range(config["num_experts"])]
        if "shared_expert_intermediate_size" in config:  # as large as the others
            yield prefix + "mlp.shared_expert_gate.weight", (1, hidden)
            blocks.append(prefix + "mlp.shared_expert.")
    else:
        inner = config["intermediate_size"]
        blocks = [prefix + "mlp."]
    for block in blocks:
        yield block + "gate_proj.weight", (inner, hidden)
        yield block + "up_proj.weight", (inner, hidden)
        yield block + "down_proj.weight", (hidden, inner)


def is_recurrent(config: dict[str, Any], layer: int) -> bool:
    """Whether a layer is a Gated DeltaNet layer."""
    return "layer_types" in config and bool(config["layer_types"][layer] == "linear_attention")


def recurrent(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name, without the layer's prefix, and shape of every tensor of a Gated DeltaNet layer."""
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    yield "in_proj_qkv.weight", (2 * keys + values, hidden)
    yield "in_proj_z.weight", (values, hidden)
    yield "in_proj_b.weight", (heads, hidden)
    yield "in_proj_a.weight", (heads, hidden)
    yield "conv1d.weight", (2 * keys + values, 1, config["linear_conv_kernel_dim"])
    yield "A_log", (heads,)
    yield "dt_bias", (heads,)
    yield "norm.weight", (config["linear_value_head_dim"],)
    yield "out_proj.weight", (hidden, values)


def deviation(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a matrix's values: keeps the magnitude of activations, and a mixture's tokens distinct.

    With a smaller embedding attention's mean over the past outweighs the token, and all tokens choose the same experts.
    """
    if name == "model.embed_tokens.weight" and "num_experts" in config:
        return 1.0
    return 0.7 / math.sqrt(shape[-1])


class Tensor(NamedTuple):
    """A tensor of a file of weights. number: its place among all of the checkpoint, from which its values follow."""

    number: int
    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)


def deal(config: dict[str, Any], shard_bytes: int) -> dict[str, list[Tensor]]:
    """The tensors of every file of weights, by its name."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for number, (name, shape) in enumerate(tensors(config)):
        tensor = Tensor(number, name, shape)
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def header(shard: list[Tensor]) -> bytes:
    """The beginning of a file of weights: the length of its header, and the header."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        offsets = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets}
        offset += tensor.nbytes
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head


def write_values(file: BinaryIO, rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> None:
    """Write one tensor in bf16: a vector of values near 1, a matrix of normal values."""
    if len(shape) == 1:
        file.write(_bf16(1 + 0.1 * rng.standard_normal(shape, dtype=np.float32)).data)
        return
    rows, columns = shape[0], shape[-1]
    step = max(1, (1 << 20) // columns)
    for row in range(0, rows, step):
        values = rng.standard_normal((min(step, rows - row), columns), dtype=np.float32)
        values *= deviation
        file.write(_bf16(values).data)


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype("<u2")


def write_shard(path: Path, config: dict[str, Any], shard: list[Tensor], seed: int) -> None:
    """Write a file of weights, which has its name only when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(header(shard))
        for tensor in shard:
            rng = np.random.Generator(np.random.SFC64([seed, tensor.number]))
            write_values(file, rng, tensor.shape, deviation(config, tensor.name, tensor.shape))
    partial.replace(path)


def write_others(config: dict[str, Any], out: Path, tokenizer: Path, shards: dict[str, list[Tensor]]) -> None:
    """Write all files of the checkpoint directory but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write(config: dict[str, Any], out: Path, tokenizer: Path, shard_bytes: int, seed: int) -> None:
    """Write the checkpoint directory and print a line to stderr for every file of weights."""
    shards = deal(config, shard_bytes)
    write_others(config, out, tokenizer, shards)
    for name, shard in shards.items():
        write_shard(out / name, config, shard, seed)
        print(f"{out / name}  {(out / name).stat().st_size / 1e9:.2f} GB", file=sys.stderr, flush=True)


def write_converted(config: dict[str, Any], out: Path, tokenizer: Path, shard_bytes: int, seed: int, bits: int) -> None:
    """Convert the checkpoint to `out` with one file of weights on disk at a time; prints to stderr what it took."""
    import peak  # not on Windows
    from npqwen_quant import Shards, convert_shards

    shards = deal(config, shard_bytes)
    files = {name: len(header(shard)) + sum(tensor.nbytes for tensor in shard) for name, shard in shards.items()}
    key = json.dumps([config, shard_bytes, seed])
    start = time.perf_counter()
    measured = -math.inf
    generating = 0.0
    disk = 0

    def fetch(name: str, place: Path) -> Path:
        nonlocal generating
        began = time.perf_counter()
        if not (place / name).exists():
            write_shard(place / name, config, shards[name], seed)
        generating += time.perf_counter() - began
        print(f"{name}  {files[name] / 1e9:.2f} GB, {began - start:.0f} s", file=sys.stderr, flush=True)
        return place / name

    def progress(done: int, total: int) -> None:
        nonlocal disk, measured
        if time.perf_counter() < measured + 1:
            return
        measured = time.perf_counter()
        disk = max(disk, peak.disk(out.parent.glob(f".{out.name}.*")))

    with tempfile.TemporaryDirectory() as others:
        write_others(config, Path(others), tokenizer, shards)
        convert_shards(others, out, Shards(key, files, fetch), bits, progress=progress)
    print(
        f"{time.perf_counter() - start:.0f} s, {generating:.0f} of them for the weights; peak of memory "
        f"{peak.memory() / 1e9:.2f} GB, of disk {disk / 1e9:.2f} GB",
        file=sys.stderr,
    )


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=TINY, help="directory to copy the tokenizer from")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the real model's")
    parser.add_argument("--draft-layer", action="store_true", help="of a hybrid, with a draft layer (mtp.*)")
    parser.add_argument("--shard-mb", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--convert", type=int, metavar="BITS", help="write a converted model, not the checkpoint")
    options = parser.parse_args()
    config = dict(SIZES[options.size])
    if options.draft_layer:
        config["mtp_num_hidden_layers"] = 1
    if options.layers:
        config["num_hidden_layers"] = config["max_window_layers"] = options.layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][: options.layers]
    arguments = config, options.out, options.tokenizer, options.shard_mb << 20, options.seed
    if options.convert is None:
        write(*arguments)
    else:
        write_converted(*arguments, options.convert)


if __name__ == "__main__":
    main()
