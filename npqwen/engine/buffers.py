"""Memory that forward passes write to, allocated once for the largest pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.records import Activations, ExpertActivations, RecurrentActivations, Workspace
from npqwen.engine.weights import PlannedWeights, Weights
from npqwen.errors import OptionError
from npqwen.format.config import Config
from npqwen.format.encodings import UNIT_COLUMNS, UNIT_ROWS
from npqwen.format.layout import pad
from npqwen.kernels import attention, gated_delta, low_rank, matmul
from npqwen.kernels.experts import most_segments, most_slots
from npqwen.kernels.greatest import MAXIMA_BLOCK
from npqwen.kernels.matrix import GROUPS_PER_BLOCK
from npqwen.kernels.packing import WIDEST, packed_bytes, tile_width
from npqwen.kernels.prompt_matmul import PROMPT_WIDTH
from npqwen.simd.llvm import CACHE_LINE


class Buffers:
    """The arrays of passes of up to `tokens` tokens, of sequences of up to `context`; see npqwen.engine.records.

    They are zeroed, so that the padding of every row stays zero, and use memory only where they are written.
    """

    def __init__(
        self,
        config: Config,
        weights: Weights | PlannedWeights,
        threads: int,
        tokens: int,
        context: int,
        *,
        rank: int = 0,
    ) -> None:
        """rank: the largest rank of the model's adapters."""
        model = weights.model[0]
        layers, draft = np.concatenate([weights.layers, weights.draft_layers]), weights.draft
        dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        hidden = int(model["embed_tokens"]["cols"])
        attended = int(layers["o_proj"]["cols"].max())
        sparse = layers["expert_bytes"] > 0
        inner = int(layers["down_proj"]["cols"][~sparse].max(initial=UNIT_COLUMNS))
        inner = max(inner, int(layers["shared_down_proj"]["cols"].max()))
        expert_inner = int(layers["down_proj"]["cols"][sparse].max(initial=UNIT_COLUMNS))
        widest = max(WIDEST, PROMPT_WIDTH)
        tokens = pad(tokens, widest)
        draft_columns = int(draft["fc"]["cols"].max(initial=0))
        slots = 0
        self.experts: ExpertActivations | None = None
        if config.mixture is not None:
            experts, chosen = config.mixture.num_experts, config.mixture.num_experts_per_tok
            slots = pad(most_slots(tokens, experts, chosen), widest)
            self.experts = ExpertActivations(
                normed=_floats(tokens, hidden),
                scores=_floats(tokens, pad(experts, UNIT_ROWS)),
                chosen=np.zeros((tokens, chosen), np.int64),
                weights=_floats(tokens, chosen),
                counts=np.zeros(experts, np.int64),
                slots=np.zeros((tokens, chosen), np.int64),
                segments=np.zeros((most_segments(tokens, experts, chosen), 4), np.int64),
                segment_count=np.zeros(1, np.int64),
                gated=_bytes(packed_bytes(slots, expert_inner)),
                results=_floats(slots, hidden),
            )
        self.recurrent: RecurrentActivations | None = None
        if config.recurrence is not None:
            self.recurrent = RecurrentActivations(
                projected=_floats(tokens, int(max(layers["in_proj"]["rows"].max(), layers["q_gate"]["rows"].max()))),
                gates=_floats(tokens, int(layers["in_proj_ba"]["rows"].max())),
            )
        self.activations = Activations(
            hidden=_floats(tokens, hidden),
            packed=_bytes(packed_bytes(max(tokens, slots), max(hidden, attended, draft_columns))),
            gated=_bytes(packed_bytes(tokens, inner)),
            queries=_floats(tokens, heads * dim),
            attended=_floats(tokens, attended),
            partials=np.zeros(attention.partial_floats(kv_heads, heads // kv_heads, dim, context), np.float32),
        )
        multiple = max(dim // UNIT_ROWS, GROUPS_PER_BLOCK)
        # Besides the input of a draft layer's matrix, a thread holds an embedding.
        columns = max(hidden, attended, inner, expert_inner, draft_columns + hidden if draft_columns else 0)
        scratch = max(
            attention.scratch_floats(dim),
            matmul.scratch_floats(columns),
            matmul.scratch_floats(hidden, multiple),
            columns,
            low_rank.WIDE * rank,
            gated_delta.scratch_floats(
                int(model["linear_key_head_dim"]), int(model["linear_value_head_dim"])
            ) if config.recurrence else 0,
        )
        self.inner, self.expert_inner = inner, expert_inner
        """Columns of down_proj in dense layers and of experts, padding included."""
        self.workspace = Workspace(
            scratch=_floats(threads, scratch), local=_floats(threads, matmul.local_floats(tokens, multiple))
        )
        self._output_encoding = int(model["lm_head"]["encoding"])
        self._logits = np.zeros((0, int(model["lm_head"]["rows"])), np.float32)

    @property
    def nbytes(self) -> int:
        """Maximum bytes in use, without the logits."""
        groups = (self.activations, self.experts or (), self.recurrent or (), self.workspace)
        return sum(array.nbytes for group in groups for array in group)

    def logits(self, rows: int) -> NDArray[np.float32]:
        """An array for this many rows of logits: (at least `padded_rows(rows)`, padded vocabulary)."""
        if len(self._logits) < self.padded_rows(rows):
            self._logits = self.new_logits(rows)
        return self._logits

    def new_logits(self, rows: int) -> NDArray[np.float32]:
        """A new array for this many rows of logits: (padded_rows(rows), padded vocabulary)."""
        return np.empty((self.padded_rows(rows), self._logits.shape[1]), np.float32)

    def check_results(self, rows: int, out: NDArray[np.float32] | None, maxima: NDArray[np.float32] | None) -> None:
        """Raise OptionError unless `out` can take this many rows of logits, and `maxima` the maxima of their blocks."""
        if not rows:
            return
        columns = self._logits.shape[1]
        for name, array, least, width in (
            ("out", out, self.padded_rows(rows), columns),
            ("maxima", maxima, rows, columns // MAXIMA_BLOCK),
        ):
            if array is None:
                continue
            is_large_enough = array.ndim == 2 and len(array) >= least and array.shape[1] == width
            if array.dtype != np.float32 or not is_large_enough or not array.flags.carray:
                raise OptionError(f"{name} must be a C-contiguous float32 array of at least {least} rows by {width}")

    def padded_rows(self, rows: int) -> int:
        """`rows`, padded to whole tiles of tokens."""
        return pad(rows, tile_width.py_func(rows, self._output_encoding, False)) if rows else 0


def _floats(rows: int, columns: int) -> NDArray[np.float32]:
    """Zeros, aligned to a cache line."""
    return _bytes(4 * rows * columns).view(np.float32).reshape(rows, columns)


def _bytes(size: int) -> NDArray[np.uint8]:
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + size]
