"""Small hybrids with random weights, made by transformers (tests/data/README.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from checkpoints import TINY, from_bf16, read_safetensors, to_bf16, write_checkpoint, write_safetensors

HYBRIDS = ("next", "qwen35", "qwen35-moe")
_DATA = Path(__file__).parent / "data"
_GOLDEN = np.load(_DATA / "hybrid.npz")


def hybrid_checkpoint(name: str, place: Path) -> Path:
    """A directory with the checkpoint and the example model's tokenizer.

    name: of `HYBRIDS`, perhaps followed by "+draft" for one with a draft layer; or "mtp", which is trained and has one.
    """
    own, _, draft = name.partition("+")
    shutil.copytree(_DATA / "hybrid" / own, place)
    if draft:
        add_draft_layer(place)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, place / file)
    return place


def golden(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text's ids (tokens,), some ids (n,), and transformers' logits of these, float32 (tokens, n)."""
    return _GOLDEN[f"ids-{name}"], _GOLDEN["columns"], _GOLDEN[name]


def draft_tensors(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a draft layer for a hybrid of `HYBRIDS` with these tensors, bf16 as its bits.

    The layer itself is a copy of the last one; what is around it is random.
    """
    rng = np.random.default_rng(7)
    of_last = ((name, name.partition("layers.3.")[2]) for name in stored)
    found = {f"mtp.layers.0.{own}": stored[name] for name, own in of_last if own}
    size = len(found["mtp.layers.0.input_layernorm.weight"])
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        found[f"mtp.{name}.weight"] = to_bf16(0.3 * rng.standard_normal(size))
    found["mtp.fc.weight"] = to_bf16(rng.standard_normal((size, 2 * size)) / np.sqrt(2 * size))
    return found


def add_draft_layer(checkpoint: Path, without: str = "") -> None:
    """Give a checkpoint of `HYBRIDS` a draft layer. without: the name of a tensor that is left out."""
    stored = read_safetensors(checkpoint / "model.safetensors")
    stored |= draft_tensors(stored)
    stored.pop(without, None)
    write_safetensors(checkpoint / "model.safetensors", stored)


def write_odd_hybrid(place: Path) -> dict[str, np.ndarray]:
    """Write a random Qwen3-Next whose sizes differ wherever they can, with a dense layer; returns its tensors, float32.

    Attention has 192 columns before o_proj and Gated DeltaNet 288; a dense feed-forward 224, the shared expert 96.
    """
    config = json.loads((_DATA / "hybrid" / "next" / "config.json").read_text()) | {
        "hidden_size": 144,
        "intermediate_size": 224,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 18,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "vocab_size": 300,
    }
    rng = np.random.default_rng(11)

    def random(*shape: int) -> np.ndarray:
        size = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        return from_bf16(to_bf16(size * rng.standard_normal(shape)))

    tensors = {"model.embed_tokens.weight": random(300, 144), "lm_head.weight": random(300, 144)}
    tensors["model.norm.weight"] = random(144)
    for i, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}."
        if kind == "full_attention":
            shapes = {"q_proj": (384, 144), "k_proj": (64, 144), "v_proj": (64, 144), "o_proj": (144, 192)}
            tensors |= {f"{layer}self_attn.{name}.weight": random(*shape) for name, shape in shapes.items()}
            tensors |= {f"{layer}self_attn.{name}_norm.weight": random(32) for name in "qk"}
        else:
            shapes = {"in_proj_qkvz": (704, 144), "in_proj_ba": (36, 144), "out_proj": (144, 288)}
            tensors |= {f"{layer}linear_attn.{name}.weight": random(*shape) for name, shape in shapes.items()}
            tensors |= {f"{layer}linear_attn.{name}": random(18) for name in ("A_log", "dt_bias")}
            tensors[f"{layer}linear_attn.conv1d.weight"] = random(416, 1, 4)
            tensors[f"{layer}linear_attn.norm.weight"] = random(16)
        inner = {"mlp.": 224}
        if i not in config["mlp_only_layers"]:
            inner = {f"mlp.experts.{n}.": 48 for n in range(4)} | {"mlp.shared_expert.": 96}
            tensors[f"{layer}mlp.gate.weight"] = random(4, 144)
            tensors[f"{layer}mlp.shared_expert_gate.weight"] = random(1, 144)
        for part, size in inner.items():
            tensors |= {f"{layer}{part}{name}_proj.weight": random(size, 144) for name in ("gate", "up")}
            tensors[f"{layer}{part}down_proj.weight"] = random(144, size)
        tensors |= {f"{layer}{name}.weight": random(144) for name in ("input_layernorm", "post_attention_layernorm")}
    write_checkpoint(place, config, tensors, tokenizer=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, place / file)
    return tensors
