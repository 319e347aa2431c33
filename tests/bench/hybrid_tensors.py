"""What llama.cpp's converter makes of the tensors of hybrids (Qwen3-Next, Qwen3.5): names, shapes and values.

Norms, but for the one within a Gated DeltaNet layer, become factors (1 + the checkpoint's weight), A_log becomes
-exp(A_log), and the convolution loses its axis of 1. Qwen3-Next's projections of q, k, v and z, which are grouped by
key head, are taken apart. Qwen3.5's value heads, which are grouped by key head in a checkpoint, take turns: the first
of each key head, then the second of each, and so on; so does all that has a row, a channel, a column or an element for
each. Images (visual) and the draft layer (mtp) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]
Order = npt.NDArray[np.int64]

ARCHITECTURES = {
    "qwen3_next": "qwen3next",
    "qwen3_5": "qwen35",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_5_moe_text": "qwen35moe",
}
"""GGUF's architecture of each `model_type` that is a hybrid."""

_PLACES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
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
    **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
    **{f"mlp.experts.{part}_proj.weight": f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")},
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Target:
    """A tensor of a GGUF file, or an expert's part of one, which all experts' parts are stacked to."""

    name: str
    expert: int | None
    shape: tuple[int, ...]
    made: Callable[[Values], Values]
    """The values, of the checkpoint's: float32, or of a matrix any type that its elements are stored in."""


def targets(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Target]:
    """What llama.cpp makes of a checkpoint's tensor: one, two, or none.

    shape: the tensor's. config: that of the text model in config.json. Raises ValueError for tensors that hybrids lack.
    """
    part = name.replace("model.language_model.", "model.").removeprefix("model.")
    if part.startswith(("visual.", "mtp.")):
        return []
    prefix, expert = "", None
    if found := _LAYER.fullmatch(part):
        prefix, part = f"blk.{found[1]}.", found[2]
    if found := _EXPERT.match(part):
        expert, part = int(found[1]), part.replace(found[0], "mlp.experts.")
    if part == "linear_attn.in_proj_qkvz.weight":
        places, orders = ["attn_qkv.weight", "attn_gate.weight"], _apart(config)
        made: list[Callable[[Values], Values]] = [_Gathered(rows) for rows in orders]
        sizes = [(len(rows), *shape[1:]) for rows in orders]
    elif part in _PLACES:
        places, made = [_PLACES[part]], [_made(part, config)]
        sizes = [(shape[0], *shape[2:]) if part == "linear_attn.conv1d.weight" else shape]
    else:
        raise ValueError(f"{name} is not a tensor of a hybrid with experts one by one")
    return [Target(prefix + place, expert, size, make) for place, size, make in zip(places, sizes, made, strict=True)]


@dataclass(frozen=True)
class _Gathered:
    """Rows, or what else lies along an axis, in another order."""

    order: Order
    axis: int = 0

    def __call__(self, values: Values) -> Values:
        return np.take(values, self.order, self.axis)


def _apart(config: Mapping[str, Any]) -> tuple[Order, Order]:
    """Where the rows of q, k and v, and those of z, are among those of each key head."""
    keys, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"] // keys
    rows = np.arange(keys * 2 * (size + values)).reshape(keys, -1)
    q, k, v, z = np.split(rows, np.cumsum([size, size, values]), 1)
    return np.concatenate([q.ravel(), k.ravel(), v.ravel()]), z.ravel()


def _made(part: str, config: Mapping[str, Any]) -> Callable[[Values], Values]:
    """What becomes of a tensor's values. part: its name in a layer, or without one."""
    if part.endswith("norm.weight") and part != "linear_attn.norm.weight":
        return lambda values: values + np.float32(1)
    if not part.startswith("linear_attn.") or part == "linear_attn.norm.weight":
        return lambda values: values
    keys, heads, size = (config[f"linear_{name}"] for name in ("num_key_heads", "num_value_heads", "value_head_dim"))
    qk = 2 * keys * config["linear_key_head_dim"]
    in_turns = config["model_type"] != "qwen3_next"

    def turns(size: int) -> _Gathered:
        """The value heads, each of `size` elements."""
        grouped = np.arange(heads * size).reshape(keys, heads // keys, size)
        return _Gathered((grouped.swapaxes(0, 1) if in_turns else grouped).ravel())

    inputs = _Gathered(np.concatenate([np.arange(qk), qk + turns(size).order]))
    kinds: dict[str, Callable[[Values], Values]] = {
        "in_proj_qkv.weight": inputs,
        "conv1d.weight": lambda values: inputs(values[:, 0]),
        "in_proj_z.weight": turns(size),
        "in_proj_b.weight": turns(1),
        "in_proj_a.weight": turns(1),
        "in_proj_ba.weight": lambda values: values,  # of Qwen3-Next
        "dt_bias": turns(1),
        "A_log": lambda values: turns(1)(-np.exp(values.astype(np.float64)).astype(np.float32)),
        "out_proj.weight": _Gathered(turns(size).order, 1),
    }
    return kinds[part.removeprefix("linear_attn.")]
