"""llama.cpp's GGUF files of the small hybrids, made again from the checkpoints: byte for byte, by their digests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import read_safetensors
from gguf_files import LLAMA, rebuilt_of

from npqwen.format.config import read_json

DATA = Path(__file__).parent / "data" / "hybrid"
_PLACES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}


def hybrid_gguf(name: str, place: Path) -> Path:
    """llama.cpp's BF16 file of one of the small hybrids."""
    path = rebuilt_of(name, llama_tensors(name), place)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == str(LLAMA[f"{name}.sha256"])
    return path


def llama_tensors(name: str) -> dict[str, np.ndarray]:
    """float32 tensors as llama.cpp's converter makes them, under GGUF's names."""
    raw = read_json(DATA / name / "config.json")
    config = raw.get("text_config", raw)
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    stored = read_safetensors(DATA / name / "model.safetensors")
    for key in sorted(stored, key=_natural):
        module = key.replace("model.language_model.", "model.")
        if "visual" in module:
            continue
        values = (stored[key].astype(np.uint32) << 16).view(np.float32)
        if module == "lm_head.weight":
            found["output.weight"] = values
            continue
        module, layer = module.removeprefix("model."), ""
        if module.startswith("layers."):
            number, _, module = module.removeprefix("layers.").partition(".")
            layer = f"blk.{number}."
        if ".experts." in module:
            part = module.split(".")[3].removesuffix("_proj")
            experts.setdefault(f"{layer}ffn_{part}_exps.weight", []).append(values)
        elif module.startswith(("mlp.shared_expert.", "mlp.")) and module.endswith("_proj.weight"):
            part = module.split(".")[-2].removesuffix("_proj")
            found[f"{layer}ffn_{part}{'_shexp' if 'shared' in module else ''}.weight"] = values
        elif module == "linear_attn.in_proj_qkvz.weight":
            found[layer + "attn_qkv.weight"], found[layer + "attn_gate.weight"] = _apart(values, config)
        else:
            found[layer + _PLACES[module]] = _changed(module, values, config, turns=name != "next")
    return found | {key: np.stack(values) for key, values in experts.items()}


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _apart(qkvz: np.ndarray, config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of q, k and v, and of z, from those of each key head."""
    keys, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"] // keys
    q, k, v, z = np.split(qkvz.reshape(keys, -1, qkvz.shape[1]), np.cumsum([size, size, values]), 1)
    return np.concatenate([part.reshape(-1, qkvz.shape[1]) for part in (q, k, v)]), z.reshape(-1, qkvz.shape[1])


def _changed(module: str, values: np.ndarray, config: dict[str, Any], turns: bool) -> np.ndarray:
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    qk = 2 * keys * config["linear_key_head_dim"]

    def tile(x: np.ndarray) -> np.ndarray:
        """With the value heads along the first axis in turns of the key heads, not grouped by them."""
        grouped = x.reshape(keys, heads // keys, -1, *x.shape[1:])
        tiled: np.ndarray = grouped.swapaxes(0, 1).reshape(x.shape)
        return tiled

    part = module.removeprefix("linear_attn.")
    if module.endswith("norm.weight") and module != "linear_attn.norm.weight":
        return np.asarray(values + np.float32(1))
    if part == "A_log":
        values = -np.exp(values.astype(np.float64)).astype(np.float32)
    if part == "conv1d.weight":
        values = values[:, 0]
    if not turns or part == module or part == "norm.weight":
        return values
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        return np.concatenate([values[:qk], tile(values[qk:])])
    return tile(values.T).T if part == "out_proj.weight" else tile(values)
