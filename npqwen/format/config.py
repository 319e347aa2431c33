"""A Qwen3 model's dimensions, read from its `config.json` and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npqwen.errors import CheckpointError
from npqwen.format.files import LARGEST_JSON, VALUES, read_json_text, read_small
from npqwen.wording import quoted, shortened, unreadable

MODEL_TYPES = ("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
FAMILY = "Qwen3, Qwen3-Next and Qwen3.5 to 3.8"
"""The models of these types, for messages."""
_MIXTURES = ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
_HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
CONVOLUTION = 4
"""Tokens that a Gated DeltaNet layer's convolution sees (config key linear_conv_kernel_dim), the same in all models."""
_LAYER_TYPES = ("linear_attention", "full_attention")
_LAYERS = 1 << 16
_POSITIONS = 2**31
"""Most tokens of a context, YaRN included."""


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al. 2023), config key `rope_scaling` or `rope_parameters`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Mixture:
    """The experts of a sparse model, under the names that they have in `config.json`."""

    num_experts: int
    """`num_local_experts` in transformers 5."""
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    """Whether the chosen experts' probabilities are divided by their sum."""
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    shared_expert_intermediate_size: int = 0
    """Inner size of the shared expert, which sees every token, in hybrids; 0 without one."""


@dataclass(frozen=True)
class Recurrence:
    """The Gated DeltaNet layers of a hybrid (Yang et al. 2024), under the names that they have in `config.json`."""

    linear_num_key_heads: int
    linear_num_value_heads: int
    """A multiple of linear_num_key_heads."""
    linear_key_head_dim: int
    linear_value_head_dim: int
    layer_types: tuple[str, ...]
    """For each layer "linear_attention" or "full_attention"."""

    @property
    def keys(self) -> int:
        """Elements of all heads' keys."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def values(self) -> int:
        """Elements of all heads' values."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values


@dataclass(frozen=True)
class Config:
    """A Qwen3 text model's dimensions, under the names that they have in `config.json`."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    """Rotated coordinates of a head: head_dim times the key partial_rotary_factor."""
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    tie_word_embeddings: bool
    mixture: Mixture | None = None
    recurrence: Recurrence | None = None
    """None unless the model is a hybrid, whose attention layers also have an output gate."""
    mtp_num_hidden_layers: int = 0
    """1 if the model has a draft layer (multi-token prediction), which drafts the token after the next."""

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer is a Gated DeltaNet layer in place of attention."""
        return self.recurrence is not None and self.recurrence.layer_types[layer] == "linear_attention"

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        mixture = self.mixture
        return (
            mixture is not None
            and layer not in mixture.mlp_only_layers
            and (layer + 1) % mixture.decoder_sparse_step == 0
        )

    @property
    def longest_context(self) -> int:
        """Tokens of the longest context, YaRN's extension included."""
        if self.yarn is None:
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(self.yarn.factor * self.yarn.original_max_position_embeddings))

    @property
    def trained_context(self) -> int:
        """Tokens of the context that the model was trained on, which YaRN's factor multiplies.

        Without YaRN in config.json, the largest power of two up to max_position_embeddings: Qwen3's 40,960 are the
        32,768 of its training and 8,192 for the prompt (Qwen3's model cards, "Processing Long Texts").
        """
        if self.yarn is not None:
            return self.yarn.original_max_position_embeddings
        return 1 << self.max_position_embeddings.bit_length() - 1

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> Config:
        """Check a parsed `config.json`, in the style of the hub's files or of transformers 5.

        where: the file's name, for messages. Raises CheckpointError for another architecture, a missing or an
        impossible value.
        """
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"{where}: model_type {quoted(model_type)} is not supported; npqwen runs {FAMILY}"
            )
        if raw.get("attention_bias"):
            raise CheckpointError(f"{where}: attention_bias is set, which no Qwen3 model has")
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{where}: hidden_act {quoted(raw['hidden_act'])} is not supported, only 'silu'")
        if raw.get("use_sliding_window"):
            raise CheckpointError(f"{where}: use_sliding_window is set, which no Qwen3 model uses")
        rope = raw.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"{where}: rope_parameters is {quoted(rope)}, not an object")
        scaling = raw.get("rope_scaling") or rope
        heads = _count(raw, "num_attention_heads", where)
        layers = _count(raw, "num_hidden_layers", where)
        mixture = _mixture(raw, where) if model_type in _MIXTURES else None
        head_dim = _count(raw, "head_dim", where, default=256 if model_type in _HYBRIDS else 128)
        config = cls(
            model_type=model_type,
            hidden_size=_count(raw, "hidden_size", where),
            # Qwen3.5's mixtures have no dense layer.
            intermediate_size=_count(
                raw, "intermediate_size", where, default=mixture.moe_intermediate_size if mixture else None
            ),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_count(raw, "num_key_value_heads", where, default=heads),
            head_dim=head_dim,
            vocab_size=_count(raw, "vocab_size", where),
            max_position_embeddings=_count(raw, "max_position_embeddings", where),
            rms_norm_eps=_positive(raw, "rms_norm_eps", where, default=1e-6),
            # transformers 5 prefers the one in rope_parameters.
            rope_theta=_positive(rope if rope.get("rope_theta") is not None else raw, "rope_theta", where),
            yarn=_yarn(scaling, raw, where),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            mixture=mixture,
            recurrence=_recurrence(raw, layers, where) if model_type in _HYBRIDS else None,
            rotary_dim=_rotary_dim(raw, rope, head_dim, 0.25 if model_type in _HYBRIDS else 1.0, where),
            mtp_num_hidden_layers=_draft_layers(raw, where) if model_type in _HYBRIDS else 0,
        )
        if heads % config.num_key_value_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        yarn = config.yarn
        if yarn is not None and yarn.factor * yarn.original_max_position_embeddings > _POSITIONS:
            raise CheckpointError(
                f"{where}: YaRN's factor {yarn.factor:g} makes a context of more than {_POSITIONS} tokens"
            )
        if yarn is not None and config.rope_theta <= 1:
            raise CheckpointError(f"{where}: rope_theta is {config.rope_theta:g}; with YaRN it must be more than 1")
        if config.head_dim % 16:
            raise CheckpointError(f"{where}: head_dim {config.head_dim} is not a multiple of 16")
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> Config:
        """Read `directory/config.json`."""
        return cls.from_dict(read_json(directory / "config.json"), str(directory / "config.json"))


def read_json(path: Path, largest: int = LARGEST_JSON, values: int = VALUES) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if it is missing, damaged, or not an object.

    largest: the most bytes that the file may have. values: the most values.
    """
    try:
        raw = read_json_text(read_small(path, largest), values)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a complete model directory?") from None
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {shortened(str(error))}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return raw


def _number(raw: Mapping[str, Any], key: str, where: str, default: float | None) -> float:
    value = raw.get(key, default)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{where}: {key} is missing")
    # Far wider than any model needs, and far from where float32 or the size of an array overflows.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 < value < 1e30:
        raise CheckpointError(f"{where}: {key} is {quoted(value)}, not a positive number in range")
    return value


def _positive(raw: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    return float(_number(raw, key, where, default))


def _count(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = _number(raw, key, where, default)
    if value != int(value) or value > _POSITIONS:
        raise CheckpointError(f"{where}: {key} is {quoted(value)}, not a whole number in range")
    return int(value)


def _mixture(raw: Mapping[str, Any], where: str) -> Mixture:
    """The keys of a mixture; defaults are those of transformers' Qwen3MoeConfig: 128 experts, 8 per token."""
    only = raw.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(i) is int for i in only):
        raise CheckpointError(f"{where}: mlp_only_layers is {quoted(only)}, not a list of layers")
    experts = raw.get("num_experts") or raw.get("num_local_experts")
    is_hybrid = raw.get("model_type") in _HYBRIDS
    mixture = Mixture(
        num_experts=_count({"num_experts": experts}, "num_experts", where, default=128),
        num_experts_per_tok=_count(raw, "num_experts_per_tok", where, default=8),
        moe_intermediate_size=_count(raw, "moe_intermediate_size", where, default=768),
        # Qwen3.5's mixtures have no such key, but normalize; Qwen3-Next does by default.
        norm_topk_prob=bool(raw.get("norm_topk_prob", is_hybrid)),
        decoder_sparse_step=_count(raw, "decoder_sparse_step", where, default=1),
        mlp_only_layers=tuple(only),
        shared_expert_intermediate_size=(
            _count(raw, "shared_expert_intermediate_size", where, default=512) if is_hybrid else 0
        ),
    )
    if mixture.num_experts_per_tok > mixture.num_experts:
        raise CheckpointError(
            f"{where}: num_experts_per_tok {mixture.num_experts_per_tok} is more than the {mixture.num_experts} experts"
        )
    return mixture


def _recurrence(raw: Mapping[str, Any], layers: int, where: str) -> Recurrence:
    """The keys of a hybrid; defaults are those of transformers' Qwen3NextConfig."""
    types = raw.get("layer_types")
    if types is None:
        interval = _count(raw, "full_attention_interval", where, default=4)
        if layers > _LAYERS:
            raise CheckpointError(f"{where}: num_hidden_layers is {layers}, more than {_LAYERS}")
        types = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= set(_LAYER_TYPES):
        raise CheckpointError(
            f"{where}: layer_types is {quoted(types)}; it must name {' or '.join(_LAYER_TYPES)} for each of the "
            f"{layers} layers"
        )
    if "full_attention" not in types:
        raise CheckpointError(f"{where}: layer_types has no full_attention, which every Qwen3 hybrid has")
    taps = _count(raw, "linear_conv_kernel_dim", where, default=CONVOLUTION)
    if taps != CONVOLUTION:
        raise CheckpointError(f"{where}: linear_conv_kernel_dim {taps} is not supported, only {CONVOLUTION}")
    if raw.get("attn_output_gate", True) is not True:
        raise CheckpointError(f"{where}: attn_output_gate is false, which no Qwen3 hybrid has")
    if raw.get("output_gate_type", "swish") not in ("swish", "silu"):
        raise CheckpointError(
            f"{where}: output_gate_type {quoted(raw['output_gate_type'])} is not supported, only 'swish'"
        )
    recurrence = Recurrence(
        linear_num_key_heads=_count(raw, "linear_num_key_heads", where, default=16),
        linear_num_value_heads=_count(raw, "linear_num_value_heads", where, default=32),
        linear_key_head_dim=_count(raw, "linear_key_head_dim", where, default=128),
        linear_value_head_dim=_count(raw, "linear_value_head_dim", where, default=128),
        layer_types=tuple(types),
    )
    for key in ("linear_key_head_dim", "linear_value_head_dim"):
        if getattr(recurrence, key) % 16:
            raise CheckpointError(f"{where}: {key} {getattr(recurrence, key)} is not a multiple of 16")
    if recurrence.linear_num_value_heads % recurrence.linear_num_key_heads:
        raise CheckpointError(
            f"{where}: linear_num_value_heads {recurrence.linear_num_value_heads} is not a multiple of "
            f"linear_num_key_heads {recurrence.linear_num_key_heads}"
        )
    return recurrence


def _draft_layers(raw: Mapping[str, Any], where: str) -> int:
    count = raw.get("mtp_num_hidden_layers") or 0
    if type(count) is not int or count not in (0, 1):
        raise CheckpointError(f"{where}: mtp_num_hidden_layers {quoted(count)} is not supported, only 0 and 1")
    return count


def _rotary_dim(raw: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int, default: float, where: str) -> int:
    """How many coordinates of a head are rotated."""
    keys = rope if rope.get("partial_rotary_factor") is not None else raw
    factor = _positive(keys, "partial_rotary_factor", where, default=default)
    dim = int(head_dim * factor)
    if not 0 < dim <= head_dim or dim % 2:
        raise CheckpointError(
            f"{where}: partial_rotary_factor {factor:g} of head_dim {head_dim} is not an even number of coordinates"
        )
    return dim


def _yarn(scaling: Any, raw: Mapping[str, Any], where: str) -> Yarn | None:
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{where}: rope_scaling is {quoted(scaling)}, not an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise CheckpointError(f"{where}: rope type {quoted(kind)} is not supported, only 'default' and 'yarn'")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        raise CheckpointError(f"{where}: YaRN's mscale is set, which no Qwen3 model has")
    original = _count(
        scaling,
        "original_max_position_embeddings",
        where,
        default=raw.get("original_max_position_embeddings") or raw.get("max_position_embeddings"),
    )
    return Yarn(
        factor=_positive(scaling, "factor", where),
        original_max_position_embeddings=original,
        attention_factor=None
        if scaling.get("attention_factor") is None
        else _positive(scaling, "attention_factor", where),
        beta_fast=_positive(scaling, "beta_fast", where, default=32.0),
        beta_slow=_positive(scaling, "beta_slow", where, default=1.0),
        truncate=bool(scaling.get("truncate", True)),
    )
