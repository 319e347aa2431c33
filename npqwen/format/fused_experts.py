"""The parameters in which transformers keeps all experts of a layer, of three dimensions: mlp.experts.NAME.

Source: Qwen3MoeExperts of transformers.
"""

from __future__ import annotations

from npqwen.format.config import Config

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The parameters by name, and the matrices of an expert whose rows each has, one after the other."""


def fused_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """The shape of an expert's matrix in each parameter; empty for a dense model."""
    if config.mixture is None:
        return {}
    hidden, inner = config.hidden_size, config.mixture.moe_intermediate_size
    return {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
