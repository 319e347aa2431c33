"""Tensors of mixtures with those of a layer's experts in two or three, as some checkpoints have them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def stacked(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors with those of a layer's experts stacked, as mlx-lm writes them."""
    experts = sum(name.startswith("model.layers.1.mlp.experts.") for name in stored)
    found: dict[str, np.ndarray] = {}
    for name, values in stored.items():
        before, apart, after = name.partition(".mlp.experts.")
        if not apart:
            found[name] = values
        elif after.startswith("0."):
            rest = after[1:]
            all_of_them = [stored.get(f"{before}.mlp.experts.{e}{rest}") for e in range(experts)]
            found[f"{before}.mlp.switch_mlp{rest}"] = np.stack([one for one in all_of_them if one is not None])
    return found


def fused(tensors: Mapping[str, np.ndarray], transposed: bool = False) -> dict[str, np.ndarray]:
    """Gate and up in one tensor (experts, 2 * inner, hidden), down in another (experts, hidden, inner).

    transposed: each matrix, as in Qwen3-VL's checkpoints; Qwen3.5's have them as they are.
    """
    found: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        before, apart, after = name.partition(".experts.")
        if not apart:
            found[name] = values
        elif after == "0.gate_proj.weight":
            parts: dict[str, list[np.ndarray]] = {"gate": [], "up": [], "down": []}
            for part, of_part in parts.items():
                while (one := f"{before}.experts.{len(of_part)}.{part}_proj.weight") in tensors:
                    of_part.append(tensors[one])
            gate_up = np.concatenate([np.stack(parts["gate"]), np.stack(parts["up"])], 1)
            for part, stack in (("gate_up", gate_up), ("down", np.stack(parts["down"]))):
                found[f"{before}.experts.{part}_proj"] = stack.transpose(0, 2, 1).copy() if transposed else stack
    return found
