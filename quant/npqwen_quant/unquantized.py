"""A checkpoint's own predictions, computed in float32 with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen_quant import moments
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.delta_moments import recurrent
from npqwen_quant.search import F32

EMBEDDING = "model.embed_tokens.weight"

_ROWS = 1 << 14
"""Rows of the output matrix at a time."""


def final_states(
    checkpoint: Checkpoint, ids: npt.NDArray[Any], progress: Callable[[int, int], object] | None = None
) -> F32:
    """The normed hidden states after the last layer (sequences, tokens, hidden_size) of token ids (sequences, tokens).

    progress(done, total): called with layers; may raise to stop. Raises CheckpointError for a checkpoint that cannot be
    read, has weights that are not finite, or overflows float32, and for token ids without an embedding.
    """
    config = checkpoint.config
    hidden = moments.embedded(checkpoint.tensors[EMBEDDING], ids)
    for layer in range(config.num_hidden_layers):

        def load(name: str, prefix: str = f"model.layers.{layer}.") -> F32:
            return _whole(checkpoint, prefix + name)

        with np.errstate(over="ignore", invalid="ignore"):
            mixer = recurrent if config.is_recurrent(layer) else moments.attention
            mixer(config, load, hidden, moments.NONE)
            if config.is_sparse(layer):
                for _ in moments.mixture(config, load, hidden, moments.NONE):
                    pass
            else:
                moments.feed_forward(config, load, hidden, moments.NONE)
        moments.check_states(hidden, checkpoint.directory)
        if progress:
            progress(layer + 1, config.num_hidden_layers)
    return moments.norm(hidden, _whole(checkpoint, "model.norm.weight"), config)


def logits(checkpoint: Checkpoint, states: F32) -> F32:
    """The logits (tokens, vocab_size) of final states (tokens, hidden_size). Raises as final_states."""
    name = EMBEDDING if checkpoint.config.tie_word_embeddings else "lm_head.weight"
    out = np.empty((len(states), checkpoint.config.vocab_size), np.float32)
    for first, rows in _parts(checkpoint, name):
        out[:, first : first + len(rows)] = states @ rows.T
    return out


def _parts(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, F32]]:
    """A matrix some rows at a time, with the number of the first."""
    count = checkpoint.tensors[name].shape[0]
    for first in range(0, count, _ROWS):
        yield first, _rows(checkpoint, name, first, min(_ROWS, count - first))


def _whole(checkpoint: Checkpoint, name: str) -> F32:
    return _rows(checkpoint, name, 0, checkpoint.tensors[name].shape[0])


def _rows(checkpoint: Checkpoint, name: str, first: int, count: int) -> F32:
    return checkpoint.tensors[name].floats(first, count)
