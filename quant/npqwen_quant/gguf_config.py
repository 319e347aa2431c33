"""config.json and generation_config.json of a model, from the metadata of its GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npqwen.errors import CheckpointError
from npqwen.wording import quoted
from npqwen_quant.gguf_header import ARCHITECTURE, Value

ARCHITECTURES = {
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "qwen3next": "qwen3_next",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
}
"""Architectures that can be read, with their model_type in config.json."""
HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")
_MIXTURES = ("qwen3moe", "qwen3next", "qwen35moe")
_CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "qwen3next": "Qwen3NextForCausalLM",
    "qwen35": "Qwen3_5ForCausalLM",
    "qwen35moe": "Qwen3_5MoeForCausalLM",
}

_ENDS = ("<|im_end|>", "<|endoftext|>")
"""Qwen's end-of-text tokens, whatever eos_token_id says: generation_config.json has both, a GGUF file one."""

_SAMPLING = {
    "temp": ("temperature", 100),
    "top_k": ("top_k", 1e9),
    "top_p": ("top_p", 1),
    "min_p": ("min_p", 1),
    "penalty_repeat": ("repetition_penalty", 100),
}
"""Keys of general.sampling, with their names in generation_config.json and their largest values."""


class Metadata:
    """The metadata of a file, looked up by names without the architecture, with type checks."""

    def __init__(self, path: Path, entries: Mapping[str, Value]) -> None:
        """CheckpointError for an architecture that cannot be read."""
        self.path = path
        self.entries = entries
        refuse_architecture(path, entries.get(ARCHITECTURE))
        self.architecture = str(entries[ARCHITECTURE])

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """An entry of the architecture (".key") or a general one; CheckpointError for a value of another type."""
        name = self.architecture + key if key.startswith(".") else key
        value = self.entries.get(name, default)
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        raise CheckpointError(f"{self.path}: {name} is {quoted(value)}, a value of the wrong type")

    def needed(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """`get`; CheckpointError if the entry is missing."""
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path} does not give {self.architecture}{key}; is it a complete model?")
        return value


def refuse_architecture(path: Path | str, found: object) -> None:
    """CheckpointError for an architecture that cannot be read."""
    if not isinstance(found, str) or found not in ARCHITECTURES:
        what = "names no architecture" if found is None else f"has the architecture {quoted(found)}"
        raise CheckpointError(
            f"{path} {what}; npqwen reads {', '.join(ARCHITECTURES)}: Qwen3, Qwen3-Next and Qwen3.5, and their mixtures"
        )


def config(
    metadata: Metadata, vocab_size: int, tied: bool, dense_layers: Sequence[int], ends: Sequence[int]
) -> dict[str, Any]:
    """The content of config.json.

    vocab_size: rows of the embedding. tied: whether it is also the output matrix. dense_layers: of a mixture, those
    without experts. ends: `end_ids`. Raises CheckpointError for missing entries, or a model that differs from Qwen3's.
    """
    mixture, hybrid = metadata.architecture in _MIXTURES, metadata.architecture in HYBRIDS
    layers = metadata.needed(".block_count", int) - draft_layers(metadata)
    width, heads = metadata.needed(".embedding_length", int), metadata.needed(".attention.head_count", int)
    head = metadata.get(".attention.key_length", int, width // heads if heads > 0 else 0)
    for key in (".attention.value_length", *(() if hybrid else (".rope.dimension_count",))):
        if metadata.get(key, int, head) != head:
            raise CheckpointError(
                f"{metadata.path}: {metadata.architecture}{key} is {metadata.get(key, int)}, but keys have {head} "
                "numbers a head; no Qwen3 model is like that"
            )
    if metadata.get(".attention.causal", bool, True) is False:
        raise CheckpointError(f"{metadata.path} attends in both directions, as encoders do, which npqwen does not run")
    found: dict[str, Any] = {
        "architectures": [_CLASSES[metadata.architecture]],
        "attention_bias": False,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": list(ends),
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": width,
        "max_position_embeddings": metadata.needed(".context_length", int),
        "model_type": ARCHITECTURES[metadata.architecture],
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": metadata.get(".attention.head_count_kv", int, heads),
        "rms_norm_eps": metadata.needed(".attention.layer_norm_rms_epsilon", float),
        "rope_scaling": _scaling(metadata),
        "rope_theta": metadata.get(".rope.freq_base", float, 10000.0),
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
    if mixture:
        chosen = metadata.needed(".expert_used_count", int)
        small = metadata.get(".expert_feed_forward_length", int)
        if small is None and chosen > 0:  # as in llama.cpp
            small = metadata.needed(".feed_forward_length", int) // chosen
        found |= {
            "decoder_sparse_step": 1,
            "intermediate_size": metadata.get(".feed_forward_length", int, small),
            "mlp_only_layers": list(dense_layers),
            "moe_intermediate_size": small,
            "norm_topk_prob": True,  # as llama.cpp computes this architecture, whatever expert_weights_norm says
            "num_experts": metadata.needed(".expert_count", int),
            "num_experts_per_tok": chosen,
        }
        if metadata.get(".expert_weights_scale", float, 0.0) not in (0.0, 1.0):
            raise CheckpointError(f"{metadata.path} scales its experts' weights, which no Qwen3 model does")
    else:
        found["intermediate_size"] = metadata.needed(".feed_forward_length", int)
    return found | (_of_hybrid(metadata, layers, head) if hybrid else {})


def draft_layers(metadata: Metadata) -> int:
    """The number of a file's draft layers, which are its last layers."""
    found: int = metadata.get(".nextn_predict_layers", int, 0) if metadata.architecture in HYBRIDS else 0
    if found < 0:
        raise CheckpointError(f"{metadata.path}: {metadata.architecture}.nextn_predict_layers is {found}")
    return found


def _of_hybrid(metadata: Metadata, layers: int, head_dim: int) -> dict[str, Any]:
    """The entries of a hybrid's config.json that other models' lack. layers: their number without draft layers."""
    rotated = metadata.get(".rope.dimension_count", int, head_dim)
    heads = metadata.needed(".ssm.time_step_rank", int)
    inner = metadata.needed(".ssm.inner_size", int)
    if heads <= 0 or inner % heads:
        raise CheckpointError(
            f"{metadata.path}: {metadata.architecture}.ssm.inner_size {inner} is not that of {heads} heads "
            "(ssm.time_step_rank)"
        )
    found: dict[str, Any] = {
        "linear_conv_kernel_dim": metadata.needed(".ssm.conv_kernel", int),
        "linear_key_head_dim": metadata.needed(".ssm.state_size", int),
        "linear_num_key_heads": metadata.needed(".ssm.group_count", int),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
        "partial_rotary_factor": rotated / head_dim if head_dim > 0 else 0.0,
    }
    recurrent = metadata.get(".attention.recurrent_layers", list)
    if recurrent is None:
        found["full_attention_interval"] = metadata.get(".full_attention_interval", int, 4)
    else:  # too few are refused when config.json is checked
        found["layer_types"] = ["linear_attention" if one else "full_attention" for one in recurrent[:layers]]
    if metadata.architecture in _MIXTURES:
        shared = metadata.get(".expert_shared_feed_forward_length", int)
        if shared is None:  # as in llama.cpp
            shared = metadata.needed(".feed_forward_length", int)
        found["shared_expert_intermediate_size"] = shared
    return found


def _scaling(metadata: Metadata) -> dict[str, Any] | None:
    """`rope_scaling`. An unknown kind is refused when config.json is checked."""
    kind = metadata.get(".rope.scaling.type", str, "none")
    factor = metadata.get(".rope.scaling.factor", float, metadata.get(".rope.scale_linear", float, 0.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if metadata.get(".rope.scaling.attn_factor", float, 1.0) != 1.0:
        raise CheckpointError(f"{metadata.path}: {metadata.architecture}.rope.scaling.attn_factor is not supported")
    found = {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": metadata.get(".rope.scaling.original_context_length", int),
        "attention_factor": metadata.get(".rope.scaling.yarn_attn_factor", float),
        "beta_fast": metadata.get(".rope.scaling.yarn_beta_fast", float),
        "beta_slow": metadata.get(".rope.scaling.yarn_beta_slow", float),
    }
    return {key: value for key, value in found.items() if value is not None}


def end_ids(metadata: Metadata, tokens: Sequence[str]) -> list[int]:
    """The ids of end-of-text tokens: the file's own, then those of Qwen's (_ENDS), as in llama.cpp."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    own = [metadata.get(f"tokenizer.ggml.{key}", int) for key in keys]
    known = [tokens.index(token) for token in _ENDS if token in tokens]
    return list(dict.fromkeys(id for id in [*own, *known] if id is not None))


def generation_config(metadata: Metadata, ends: Sequence[int]) -> dict[str, Any] | None:
    """The content of generation_config.json; None for a file without sampling parameters.

    Then the model family's defaults apply, as for a checkpoint without generation_config.json.
    """
    found = {}
    for key, (name, most) in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}", (int, float))
        if value is not None and not 0 <= value <= most:
            raise CheckpointError(f"{metadata.path}: general.sampling.{key} is {quoted(value)}, not from 0 to {most:g}")
        if value is not None:
            found[name] = value
    if not found:
        return None
    return {"do_sample": found.get("temperature", 1.0) > 0, "eos_token_id": list(ends)} | found
