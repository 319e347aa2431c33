"""Rotary position embedding (Su et al. 2021), with YaRN (Peng et al. 2023) if the config has it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from npqwen.format.config import Config

_MIN_POSITIONS = 64
"""Positions computed at least: decoding needs the next one at every step."""


class Rope:
    """cos and sin for any position, rounded as Hugging Face transformers rounds them.

    frequency: float32 (head_dim / 2,), radians per position. scale: factor of cos and sin (YaRN's attention factor).
    """

    def __init__(self, config: Config) -> None:
        half = config.head_dim // 2
        self.scale = np.float32(1.0)
        frequency = 1.0 / config.rope_theta ** (np.arange(half, dtype=np.float32) * np.float32(2 / config.head_dim))
        yarn = config.yarn
        if yarn is not None:
            low, high = (
                config.head_dim
                * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
                / (2 * math.log(config.rope_theta))
                for turns in (yarn.beta_fast, yarn.beta_slow)
            )
            if yarn.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, config.head_dim - 1)
            ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
            frequency = frequency / yarn.factor * ramp + frequency * (1 - ramp)
            factor = yarn.attention_factor
            if factor is None:
                factor = 0.1 * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0
            self.scale = np.float32(factor)
        self.frequency = frequency.astype(np.float32)
        self._tables: tuple[int, NDArray[np.float32], NDArray[np.float32]] = 0, *self.at(np.arange(_MIN_POSITIONS))

    def tables(self, start: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin of positions start to start + count - 1, scaled: float32 (count, head_dim / 2) each."""
        first, cos, sin = self._tables
        if not first <= start <= start + count <= first + len(cos):
            self._tables = first, cos, sin = start, *self.at(np.arange(start, start + max(count, _MIN_POSITIONS)))
        return cos[start - first : start - first + count], sin[start - first : start - first + count]

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin of any positions (n,), scaled: float32 (n, head_dim / 2) each."""
        angles = positions.astype(np.float32)[:, None] * self.frequency
        return np.cos(angles) * self.scale, np.sin(angles) * self.scale
