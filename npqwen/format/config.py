"""A Qwen3 model's dimensions, read from its `config.json` and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npqwen.errors import CheckpointError, quoted, shortened
from npqwen.format.files import LARGEST_JSON, read_json_text, read_small

MODEL_TYPES = ("qwen3", "qwen3_moe")
_POSITIONS = 2**31
"""Tokens that a context may have at most, YaRN included."""


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
    """The experts of a `qwen3_moe` model, under the names that they have in `config.json`."""

    num_experts: int
    """`num_local_experts` in transformers 5."""
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    """Whether the chosen experts' probabilities are divided by their sum."""
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]


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
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    tie_word_embeddings: bool
    mixture: Mixture | None = None

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
        """Tokens of the context that the model was trained on, to which a factor of YaRN refers.

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
                f"{where}: model_type {quoted(model_type)} is not supported; npqwen runs {', '.join(MODEL_TYPES)}"
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
        config = cls(
            model_type=model_type,
            hidden_size=_count(raw, "hidden_size", where),
            intermediate_size=_count(raw, "intermediate_size", where),
            num_hidden_layers=_count(raw, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=_count(raw, "num_key_value_heads", where, default=heads),
            head_dim=_count(raw, "head_dim", where, default=128),
            vocab_size=_count(raw, "vocab_size", where),
            max_position_embeddings=_count(raw, "max_position_embeddings", where),
            rms_norm_eps=_positive(raw, "rms_norm_eps", where, default=1e-6),
            # transformers 5 prefers the one in rope_parameters.
            rope_theta=_positive(rope if rope.get("rope_theta") is not None else raw, "rope_theta", where),
            yarn=_yarn(scaling, raw, where),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            mixture=_mixture(raw, where) if model_type == "qwen3_moe" else None,
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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if it is missing, damaged, or not an object."""
    try:
        raw = read_json_text(read_small(path, LARGEST_JSON))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a complete model directory?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
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
    mixture = Mixture(
        num_experts=_count({"num_experts": experts}, "num_experts", where, default=128),
        num_experts_per_tok=_count(raw, "num_experts_per_tok", where, default=8),
        moe_intermediate_size=_count(raw, "moe_intermediate_size", where, default=768),
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        decoder_sparse_step=_count(raw, "decoder_sparse_step", where, default=1),
        mlp_only_layers=tuple(only),
    )
    if mixture.num_experts_per_tok > mixture.num_experts:
        raise CheckpointError(
            f"{where}: num_experts_per_tok {mixture.num_experts_per_tok} is more than the {mixture.num_experts} experts"
        )
    return mixture


def _yarn(scaling: Any, raw: Mapping[str, Any], where: str) -> Yarn | None:
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{where}: rope_scaling is {quoted(scaling)}, not an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise CheckpointError(f"{where}: rope type {quoted(kind)} is not supported, only 'default' and 'yarn'")
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
