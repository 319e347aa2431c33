"""Hybrids in GGUF (architectures qwen3next, qwen35, qwen35moe): undoing the changes of llama.cpp's converter.

- Norms, except for the one within a Gated DeltaNet layer, are factors already: 1 + the checkpoint's weight.
- ssm_a is -exp(A_log).
- Qwen3-Next's grouped projections are split (attn_qkv and attn_gate), except for those of b and a (ssm_ba). Old files
  have them unsplit (ssm_in).
- The value heads of Qwen3.5, which checkpoints and npqwen group by key head, are interleaved: the first of each key
  head, then the second of each, and so on. The same holds for all rows, channels, columns and elements of value heads.
- The draft layer (nextn) is numbered as an additional attention layer; if it has no final norm, it uses the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.format.config import CONVOLUTION, Config, Recurrence
from npqwen_quant.hybrid import Changed, Gathered, check_shape, in_layout
from npqwen_quant.tensors import SourceTensor

NAMES = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_in.weight": "linear_attn.in_proj_qkvz.weight",
    "ssm_ba.weight": "linear_attn.in_proj_ba.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_a": "linear_attn.decay",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
}
"""Names in GGUF, and in checkpoints, of the tensors of a hybrid's layer that other models lack."""


DRAFT = "mtp.layers.0"
"""The draft layer's name in checkpoints."""
DRAFT_NAMES = {
    "nextn.eh_proj.weight": "mtp.fc.weight",
    "nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "mtp.norm.weight",
}
"""Names in GGUF, and in checkpoints, of the tensors around the draft layer."""
OWN_VOCABULARY = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")
"""Tensors of a draft layer that does not share the model's embedding or output matrix; no Qwen model has one."""


def undone(tensors: Mapping[str, SourceTensor], config: Config, architecture: str) -> dict[str, SourceTensor]:
    """The tensors of npqwen's layout, from those of a file under their names in checkpoints (see NAMES).

    Raises CheckpointError for shapes that contradict the metadata.
    """
    recurrence = config.recurrence
    if recurrence is None:
        return dict(tensors)
    found: dict[str, SourceTensor] = {}
    if "mtp.fc.weight" in tensors and "model.norm.weight" in tensors:
        tensors = {"mtp.norm.weight": tensors["model.norm.weight"], **tensors}
    for name, tensor in tensors.items():
        _, linear, part = name.rpartition(".linear_attn.")
        source = _Negated(tensor) if linear and part == "decay" else tensor
        if linear and architecture != "qwen3next":
            source = _grouped(name, part, source, config, recurrence)
        found[name] = source
    return in_layout(found, config, zero_centred=False)


def _grouped(name: str, part: str, tensor: SourceTensor, config: Config, r: Recurrence) -> SourceTensor:
    """A tensor with its value heads grouped by key head."""
    hidden, heads = config.hidden_size, r.linear_num_value_heads
    shapes = {
        "in_proj_qkv.weight": (r.channels, hidden),
        "in_proj_z.weight": (r.values, hidden),
        "in_proj_b.weight": (heads, hidden),
        "in_proj_a.weight": (heads, hidden),
        "conv1d.weight": (r.channels, CONVOLUTION),
        "decay": (heads,),
        "dt_bias": (heads,),
        "out_proj.weight": (hidden, r.values),
    }
    if part not in shapes:
        return tensor
    check_shape(name, tensor, shapes[part])
    values = np.arange(r.values).reshape(-1, r.linear_num_key_heads, r.linear_value_head_dim).swapaxes(0, 1).ravel()
    if part == "out_proj.weight":
        return _Columns(tensor, values)
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        return Gathered(tensor, np.concatenate([np.arange(2 * r.keys), 2 * r.keys + values]))
    if part == "in_proj_z.weight":
        return Gathered(tensor, values)
    return Gathered(tensor, np.arange(heads).reshape(-1, r.linear_num_key_heads).T.ravel())


class _Negated(Changed):
    """-x of a vector."""

    def changed(self, whole: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return -whole


class _Columns(SourceTensor):
    """A matrix with its columns in another order."""

    def __init__(self, stored: SourceTensor, columns: npt.NDArray[np.int64]) -> None:
        self.path, self.shape, self.nbytes = stored.path, stored.shape, stored.nbytes
        self._stored, self._columns = stored, columns

    def check(self, name: str) -> None:
        """See SourceTensor."""
        self._stored.check(name)

    def read(self, first: int, count: int) -> npt.NDArray[Any]:
        """See SourceTensor."""
        return np.take(self._stored.read(first, count), self._columns, 1)
