"""Text that a model generates to calibrate its own quantization, without external data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from npqwen.generation.language_model import LanguageModel
from npqwen.generation.sampler import Sampler
from npqwen.generation.sampling import Sampling

TURN = "<|im_start|>user\n"
"""The beginning of a user's turn in Qwen's chat templates: after it a model writes a question, then its answer."""

BEGINNINGS = (
    *("The", "A", "In", "I", "What", "How", "1.", "#", "def ", "import", "<", "{", '"', "\n", "Q:", "$"),
    *("Die", "Le", "La", "El", "O", "Il", "De", "Да", "ال", "यह", "中", "我", "日", "この", "한", "ท"),
)
"""Texts of many kinds and languages begin like this."""

SEQUENCES, TOKENS = 32, 256
"""8,192 generated tokens calibrate as well as external text (docs/lab.md)."""


def write_own_text(
    model: LanguageModel,
    sequences: int = SEQUENCES,
    tokens: int = TOKENS,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.int32]:
    """Generate text: int32 ids (sequences, tokens), drawn from the model's own distribution without changes.

    Two of three sequences begin with a user's turn, if the model has its token, the others with a few characters. None
    ends early: what follows the end of a turn or a text is as useful. progress(done, total): in tokens.
    """
    tokenizer = model.tokenizer
    tokens = min(tokens, model.context)
    has_turns = tokenizer.token_id("<|im_start|>") is not None
    out = np.empty((sequences, tokens), np.int32)
    forbidden = tokenizer.missing_ids(model.config.vocab_size)
    for i in range(sequences):
        begins_turn = has_turns and i % 3 != 0
        prompt = tokenizer.encode(TURN if begins_turn else BEGINNINGS[i // (3 if has_turns else 1) % len(BEGINNINGS)])
        ids = prompt[:tokens]
        sampler = Sampler(Sampling(seed=seed + i), ids, forbidden)
        cache = model.new_cache(tokens)
        logits = model.prefill(ids, cache)
        while len(ids) < tokens:
            ids.append(sampler(logits))
            if len(ids) < tokens:
                logits = model.forward(ids[-1:], cache)[0]
            if progress:
                progress(i * tokens + len(ids), sequences * tokens)
        out[i] = ids
    return out
