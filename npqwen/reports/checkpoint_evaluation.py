"""The error of a conversion: the converted model's predictions of some tokens, compared with its checkpoint's own.

The checkpoint is run in float32, one layer in memory at a time, so that no unquantized conversion is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from npqwen_quant.adapter import AdapterFile
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.unquantized import final_states, logits
from numpy.typing import NDArray

from npqwen.errors import CheckpointError
from npqwen.format.quantization import EvaluationRecord
from npqwen.generation.language_model import LanguageModel
from npqwen.reports.evaluation import compare
from npqwen.reports.evaluation_report import Score, Values

AGAINST = "the checkpoint"
"""The base's name in records."""

_TOKENS = 256
"""Tokens whose logits of both models are in memory at a time."""


def evaluate_conversion(
    model: LanguageModel,
    checkpoint: Path,
    ids: NDArray[Any],
    text: str,
    progress: Callable[[int, int], None] | None = None,
    adapters: Sequence[AdapterFile] = (),
) -> EvaluationRecord:
    """Compare a converted model with the checkpoint directory that it was made from.

    ids: token ids (sequences, tokens), at least 2 tokens each; every sequence is run from an empty context, and all its
    tokens but the first are predicted. text: its name in the record. progress(done, total): called with tokens.
    adapters: those that were merged into the weights.

    Raises CheckpointError if the checkpoint cannot be read, or if logits are not finite.
    """
    total = 2 * ids.size

    def after_layers(done: int, layers: int) -> None:
        if progress:
            progress(ids.size * done // layers, total)

    source = Checkpoint(checkpoint, adapters=adapters)
    states = final_states(source, ids, after_layers)
    values = []
    for i, (sequence, hidden) in enumerate(zip(ids, states, strict=True)):
        cache = model.new_cache(len(sequence))
        for start in range(0, len(sequence) - 1, _TOKENS):
            stop = min(start + _TOKENS, len(sequence) - 1)
            found = model.forward(sequence[start:stop], cache, all_logits=True)
            values.append(compare(found, sequence[start + 1 : stop + 1], logits(source, hidden[start:stop])))
        if progress:
            progress(ids.size + (i + 1) * len(sequence), total)
    every = Values.concatenate(values)
    if every.kl is None or not np.isfinite(every.kl + every.nll).all():
        raise CheckpointError(f"{checkpoint} computes logits that are not finite; is it broken?")
    score = Score.of(every)
    assert score.divergence is not None
    return EvaluationRecord(
        text=text,
        tokens=score.tokens,
        window=ids.shape[1],
        stride=ids.shape[1],
        against=AGAINST,
        perplexity=score.perplexity.mean,
        kl_divergence=score.divergence.kl.mean,
        kl_error=score.divergence.kl.error,
        top_1=score.divergence.top_1.mean,
    )
