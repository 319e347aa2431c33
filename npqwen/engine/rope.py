"""Rotary position embedding (Su et al. 2021), with YaRN (Peng et al. 2023) if the config has it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from npqwen.format.config import Config
from npqwen.format.layout import ceil_div

_BLOCK = 256
"""Positions that are computed at once. A cosine takes 0.1 µs: those of 8 sequences would take 1% of every step."""


class Rope:
    """cos and sin for any position, rounded as Hugging Face transformers rounds them.

    frequency: float32 (rotary_dim / 2,), radians per position. scale: factor of cos and sin (YaRN's attention factor).
    """

    def __init__(self, config: Config) -> None:
        dim = config.rotary_dim
        half = dim // 2
        self.scale = np.float32(1.0)
        frequency = 1.0 / config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
        yarn = config.yarn
        if yarn is not None:
            low, high = (
                dim
                * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
                / (2 * math.log(config.rope_theta))
                for turns in (yarn.beta_fast, yarn.beta_slow)
            )
            if yarn.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
            frequency = frequency / yarn.factor * ramp + frequency * (1 - ramp)
            factor = yarn.attention_factor
            if factor is None:
                factor = 0.1 * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0
            self.scale = np.float32(factor)
        self.frequency = frequency.astype(np.float32)
        self._computed = np.zeros(0, np.bool_)
        """Which blocks of positions the tables have; memory is used only for rows that are written."""
        self._ready = 0
        """The tables have all positions below this one."""
        self._cos = self._sin = np.empty((0, half), np.float32)

    def tables(self, start: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin of positions start to start + count - 1, scaled: float32 (count, rotary_dim / 2) each."""
        end = start + count
        if end > self._ready:
            self._compute(np.arange(start // _BLOCK, ceil_div(end, _BLOCK)))
        return self._cos[start:end], self._sin[start:end]

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin of any positions (n,), scaled: float32 (n, rotary_dim / 2) each."""
        if positions.max(initial=-1) >= self._ready:
            self._compute(positions // _BLOCK)
        return self._cos[positions], self._sin[positions]

    def _compute(self, blocks: NDArray[np.int64]) -> None:
        """Compute those of these blocks of positions that the tables lack."""
        count = int(blocks.max(initial=-1)) + 1
        if count > len(self._computed):
            self._grow(1 << (count - 1).bit_length())
        for block in set(blocks[~self._computed[blocks]].tolist()):
            rows = slice(block * _BLOCK, (block + 1) * _BLOCK)
            angles = np.arange(rows.start, rows.stop).astype(np.float32)[:, None] * self.frequency
            self._cos[rows] = np.cos(angles) * self.scale
            self._sin[rows] = np.sin(angles) * self.scale
            self._computed[block] = True
        self._ready = _BLOCK * (len(self._computed) if self._computed.all() else int(self._computed.argmin()))

    def _grow(self, blocks: int) -> None:
        """Make room for this many blocks."""
        had = len(self._computed)
        self._computed = np.concatenate([self._computed, np.zeros(blocks - had, np.bool_)])
        cos, sin = (np.empty((blocks * _BLOCK, len(self.frequency)), np.float32) for _ in range(2))
        cos[: had * _BLOCK], sin[: had * _BLOCK] = self._cos, self._sin
        self._cos, self._sin = cos, sin
