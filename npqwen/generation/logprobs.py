"""How likely the model found each token of its text, and which others it found likely."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npqwen.generation.sampler import greatest
from npqwen.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """A token and the natural logarithm of its probability."""

    id: int
    bytes: bytes
    """What the token stands for: perhaps only a part of a character."""
    logprob: float

    @property
    def text(self) -> str:
        """The token's text; U+FFFD for a part of a character."""
        return self.bytes.decode("utf-8", "replace")


@dataclass(frozen=True)
class TokenLogprobs(Logprob):
    """A token of the text, and the likeliest tokens at its place, the likeliest first."""

    top: tuple[Logprob, ...] = ()


def token_logprobs(logits: NDArray[np.float32], id: int, top: int, tokenizer: Tokenizer) -> TokenLogprobs:
    """The log-probability of `id`, and the `top` likeliest tokens, of the model's own distribution.

    That is the softmax of its logits (vocab,) as they are, before any bias, penalty, temperature or filter, as
    OpenAI's API and llama.cpp have it. Embedding rows without a token are never among the likeliest.
    """
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    best: list[Logprob] = []
    if top:
        real = logits.copy()
        real[tokenizer.missing_ids(len(logits))] = -np.inf
        ids = greatest(real, top)
        ids = ids[np.argsort(-real[ids], kind="stable")][:top]
        ids = ids[real[ids] > -np.inf]
        best = [Logprob(int(i), tokenizer.token_bytes(int(i)), float(logits[i]) - total) for i in ids]
    return TokenLogprobs(id, tokenizer.token_bytes(id), float(logits[id]) - total, tuple(best))
