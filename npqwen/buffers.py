"""What a forward pass writes on its way through the layers, allocated once for the largest piece."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from npqwen.config import Config
from npqwen.kernels import attention, matmul
from npqwen.kernels.attention import MOST_ROWS
from npqwen.kernels.experts import most_segments, most_slots
from npqwen.kernels.matrix import UNIT_COLS
from npqwen.kernels.packing import WIDTHS, packed_bytes, tile_width
from npqwen.simd.tile import ROWS
from npqwen.weights import Weights, pad

_CUTS = 8
"""Tasks a thread that attention makes at most when it splits positions."""


class Buffers:
    """The team's shared arrays for up to `most` tokens.

    They are zeroed, so that the padding of every row stays zero, and take memory only where they are written.
    """

    def __init__(self, config: Config, weights: Weights, threads: int, most: int) -> None:
        model = weights.model[0]
        layers = weights.layers
        dim = int(model["head_dim"])
        hidden = int(model["embed_tokens"]["cols"])
        attended = int(layers["o_proj"]["cols"].max())
        sparse = layers["expert_bytes"] > 0
        inner = int(layers["down_proj"]["cols"][~sparse].max(initial=UNIT_COLS))
        small = int(layers["down_proj"]["cols"][sparse].max(initial=UNIT_COLS))
        most = -(-most // WIDTHS[-1]) * WIDTHS[-1]
        slots = 0
        self.mixture: tuple[NDArray[Any], ...] | None = None
        """What sparse layers write, as `forward` takes it; None if there are none."""
        if config.mixture is not None:
            experts, chosen = config.mixture.num_experts, config.mixture.num_experts_per_tok
            slots = -(-most_slots(most, experts, chosen) // WIDTHS[-1]) * WIDTHS[-1]
            self.mixture = (
                np.zeros((most, hidden), np.float32),
                np.zeros((most, pad(experts, ROWS)), np.float32),
                np.zeros((most, chosen), np.int64),
                np.zeros((most, chosen), np.float32),
                np.zeros(experts, np.int64),
                np.zeros((most, chosen), np.int64),
                np.zeros((most_segments(most, experts, chosen), 4), np.int64),
                np.zeros(1, np.int64),
                np.zeros((slots, 2 * small), np.float32),
                np.zeros((slots, hidden), np.float32),
            )
        cols = max(hidden, attended, inner, small)
        self._hidden = np.zeros((most, hidden), np.float32)
        self._packed = _aligned(packed_bytes(max(most, slots), cols))
        self._qkv = np.zeros((most, int(layers["qkv_proj"]["rows"].max())), np.float32)
        self._attended = np.zeros((most, attended), np.float32)
        self._gate_up = np.zeros((most, 2 * inner), np.float32)
        needs = attention.scratch_floats(dim), matmul.scratch_floats(cols)
        self._parts = np.zeros(_CUTS * threads * MOST_ROWS * (dim + 2), np.float32)
        self._logits = np.zeros((0, int(model["lm_head"]["rows"])), np.float32)
        self.scratches = np.zeros((threads, max(*needs, hidden, inner, small)), np.float32)
        """A row for each thread."""

    @property
    def shared(self) -> tuple[NDArray[Any], ...]:
        """hidden, packed, qkv, attended, gate_up, parts, as `forward` takes them."""
        return self._hidden, self._packed, self._qkv, self._attended, self._gate_up, self._parts

    @property
    def nbytes(self) -> int:
        """Bytes that may come to be used, logits of all positions left out."""
        return sum(array.nbytes for array in (*self.shared, *(self.mixture or ()), self.scratches))

    def logits(self, rows: int) -> NDArray[np.float32]:
        """Room for logits, rounded up to whole tiles of tokens: (>= rows, padded vocabulary)."""
        width = tile_width.py_func(rows) if rows else 1
        rows = -(-rows // width) * width
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self._logits.shape[1]), np.float32)
        return self._logits


def _aligned(size: int) -> NDArray[np.uint8]:
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]
