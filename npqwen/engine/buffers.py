"""What a forward pass writes on its way through the layers, allocated once for the largest piece."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.weights import Weights
from npqwen.format.config import Config
from npqwen.format.layout import pad
from npqwen.kernels import attention, matmul
from npqwen.kernels.attention import MOST_ROWS
from npqwen.kernels.experts import most_segments, most_slots
from npqwen.kernels.matrix import BLOCK_GROUPS, UNIT_COLS
from npqwen.kernels.packing import WIDTHS, packed_bytes, tile_width
from npqwen.simd.instructions import CACHE_LINE
from npqwen.simd.tile import ROWS

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
        most = pad(most, WIDTHS[-1])
        slots = 0
        self.mixture: tuple[NDArray[Any], ...] | None = None
        """What sparse layers write, as `forward` takes it; None if there are none."""
        if config.mixture is not None:
            experts, chosen = config.mixture.num_experts, config.mixture.num_experts_per_tok
            slots = pad(most_slots(most, experts, chosen), WIDTHS[-1])
            self.mixture = (
                _floats(most, hidden),
                _floats(most, pad(experts, ROWS)),
                np.zeros((most, chosen), np.int64),
                _floats(most, chosen),
                np.zeros(experts, np.int64),
                np.zeros((most, chosen), np.int64),
                np.zeros((most_segments(most, experts, chosen), 4), np.int64),
                np.zeros(1, np.int64),
                _bytes(packed_bytes(slots, small)),
                _floats(slots, hidden),
            )
        cols = max(hidden, attended, inner, small)
        self._hidden = _floats(most, hidden)
        self._packed = _bytes(packed_bytes(max(most, slots), max(hidden, attended)))
        self._gated = _bytes(packed_bytes(most, inner))
        self._queries = _floats(most, config.num_attention_heads * dim)
        self._attended = _floats(most, attended)
        multiple = max(dim // ROWS, BLOCK_GROUPS)
        needs = (
            attention.scratch_floats(dim), matmul.scratch_floats(cols), matmul.scratch_floats(hidden, multiple),
        )  # fmt: skip
        self._parts = np.zeros(_CUTS * threads * MOST_ROWS * (dim + 2), np.float32)
        self._logits = np.zeros((0, int(model["lm_head"]["rows"])), np.float32)
        self.scratches = _floats(threads, max(*needs, hidden, inner, small))
        """A row for each thread."""
        self.pieces = _floats(threads, matmul.piece_floats(most, multiple))
        """Results that a thread goes on with itself: a row for each."""

    @property
    def shared(self) -> tuple[NDArray[Any], ...]:
        """hidden, packed, gated, queries, attended, parts, as `forward` takes them."""
        return self._hidden, self._packed, self._gated, self._queries, self._attended, self._parts

    @property
    def nbytes(self) -> int:
        """Bytes that may come to be used, logits of all positions left out."""
        return sum(array.nbytes for array in (*self.shared, *(self.mixture or ()), self.scratches, self.pieces))

    def logits(self, rows: int) -> NDArray[np.float32]:
        """Room for logits, rounded up to whole tiles of tokens: (>= rows, padded vocabulary)."""
        width = tile_width.py_func(rows) if rows else 1
        rows = pad(rows, width)
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self._logits.shape[1]), np.float32)
        return self._logits


def _floats(rows: int, columns: int) -> NDArray[np.float32]:
    """Zeros, from a line of memory's begin."""
    return _bytes(4 * rows * columns).view(np.float32).reshape(rows, columns)


def _bytes(size: int) -> NDArray[np.uint8]:
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + size]
