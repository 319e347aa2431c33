"""The memory that Qwen3 models would need on this machine, and their speed, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from npqwen_quant.plan import plan

from npqwen.engine.budget import RESERVED, Budget
from npqwen.engine.buffers import Buffers
from npqwen.engine.engine import chunk_size
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.recurrent_states import RecurrentShape, states_bytes
from npqwen.engine.weights import PlannedWeights
from npqwen.format.config import Config
from npqwen.format.recipe import Recipe, recipe_of
from npqwen.kernels.cache_page import PAGE
from npqwen.reports.columns import columns
from npqwen.reports.info import active_bytes
from npqwen.wording import size

CONTEXT = 8192
"""Tokens of context for which memory is counted."""
BITS = (3, 4, 8)
SHARE = 0.9
"""Share of the measured bandwidth that decoding is assumed to reach; measured: 0.86 to 1.05 (docs/speed.md)."""
_DEPTH = 512
"""Tokens in the cache when the speed is estimated."""

Fit = Literal["fits", "partly", "no"]
"""Whether a model fits the available memory. "partly": a mixture of experts, at most half of whose weights are read
from disk repeatedly."""


def _dense(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
    } | more


def _sparse(hidden: int, inner: int, layers: int, heads: int, expert: int) -> dict[str, Any]:
    return _dense(
        hidden,
        inner,
        layers,
        heads,
        model_type="qwen3_moe",
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=expert,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _hybrid(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, values: int, **more: Any
) -> dict[str, Any]:
    """values: the value heads of Gated DeltaNet layers."""
    own: dict[str, Any] = {
        "model_type": "qwen3_5_text",
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "rope_theta": 10000000,
        "linear_num_value_heads": values,
        "mtp_num_hidden_layers": 1,
    }
    return _dense(hidden, inner, layers, heads, **(own | more))


MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-0.6B": _dense(1024, 3072, 28, 16, tie_word_embeddings=True),
    "Qwen3-1.7B": _dense(2048, 6144, 28, 16, tie_word_embeddings=True),
    "Qwen3-4B": _dense(2560, 9728, 36, 32, tie_word_embeddings=True),
    "Qwen3-8B": _dense(4096, 12288, 36, 32),
    "Qwen3-14B": _dense(5120, 17408, 40, 40),
    "Qwen3-32B": _dense(5120, 25600, 64, 64),
    "Qwen3-30B-A3B": _sparse(2048, 6144, 48, 32, 768),
    "Qwen3-235B-A22B": _sparse(4096, 12288, 94, 64, 1536),
    "Qwen3.5-0.8B": _hybrid(1024, 3584, 24, 8, 2, 16, tie_word_embeddings=True),
    "Qwen3.5-2B": _hybrid(2048, 6144, 24, 8, 2, 16, tie_word_embeddings=True),
    "Qwen3.5-4B": _hybrid(2560, 9216, 32, 16, 4, 32, tie_word_embeddings=True),
    "Qwen3.5-9B": _hybrid(4096, 12288, 32, 16, 4, 32),
    "Qwen3.5-27B": _hybrid(5120, 17408, 64, 24, 4, 48),
    "Qwen3.5-35B-A3B": _hybrid(
        2048,
        512,
        40,
        16,
        2,
        32,
        model_type="qwen3_5_moe_text",
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    ),
}
"""The shapes of Qwen's models, by the names that `npqwen chat` accepts, from their config.json files."""


@dataclass(frozen=True)
class Forecast:
    """A model at some bits on this machine. Sizes are in bytes."""

    model: str
    bits: int
    weights: int
    """Of the converted model, on disk and mapped."""
    needed: int
    """Memory for everything at `CONTEXT` tokens: weights, keys and values, buffers, Python."""
    fit: Fit
    tokens_per_second: float | None
    """Decoding speed, estimated from the memory bandwidth; None where that is not the limit."""

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def cell(self) -> str:
        """The text of a table's cell."""
        if self.fit == "no":
            return f"{size(self.needed)}, too large"
        if self.fit == "partly":
            return f"{size(self.needed)}, from disk"
        speed = self.tokens_per_second
        return size(self.needed) if speed is None else f"{size(self.needed)}, {speed:.{0 if speed >= 10 else 1}f}/s"


def forecasts(available: int | None, bandwidth: float | None, threads: int) -> Iterator[Forecast]:
    """Every model of `MODELS` at each of `BITS`.

    available: bytes of memory; None if unknown, then everything fits. bandwidth: bytes a second that `threads` threads
    read; None where it does not limit the speed, as with portable kernels.
    """
    for name, raw in MODELS.items():
        config = Config.from_dict(raw)
        for bits in BITS:
            yield _forecast(name, config, recipe_of(bits), available, bandwidth, threads)


def _forecast(
    name: str, config: Config, recipe: Recipe, available: int | None, bandwidth: float | None, threads: int
) -> Forecast:
    tensors = [(tensor.name, tensor.nbytes) for tensor in plan(config, recipe)]
    budget = Budget(
        weights=sum(count for _, count in tensors),
        working=Buffers(config, PlannedWeights(config, recipe), threads, chunk_size(config), CONTEXT).nbytes,
        page=KVCache(config, 1, recipe.cache_type).page_bytes,
        available=available,
        states=states_bytes(config),
    )
    fit: Fit = "fits"
    if budget.fitting(CONTEXT) < CONTEXT:
        half = config.mixture is not None and 2 * (budget.resident(CONTEXT) or 0) >= budget.weights
        fit = "partly" if half else "no"
    speed = None
    if bandwidth is not None and fit == "fits":
        shape = RecurrentShape.of(config)
        states = 0 if shape is None else 2 * shape.nbytes  # read and written
        speed = SHARE * bandwidth / (active_bytes(config, tensors) + states + _DEPTH * budget.page // PAGE)
    return Forecast(name, recipe.bits, budget.weights, budget.needed(CONTEXT) + RESERVED, fit, speed)


def table(found: list[Forecast]) -> str:
    """A table as text: a row for each model, with its forecast at each of `BITS`."""
    rows = [("MODEL", *(f"--bits {bits}" for bits in BITS))]
    for model in dict.fromkeys(one.model for one in found):
        rows.append((model, *(one.cell() for one in found if one.model == model)))
    return columns(rows)
