"""Log-probabilities as APIs write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from npqwen.generation.completion import Logprob, TokenLogprobs

TOP_LOGPROBS = 20
"""How many of the likeliest tokens at each position a request may have, as in OpenAI's own service and in ollama."""

_LEAST = -9999.0


def finite(token: Logprob) -> float:
    """A token's log-probability; of one that cannot occur OpenAI's -9999, because JSON has no infinity."""
    return max(token.logprob, _LEAST)


def scored_tokens(tokens: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
    """Tokens of an answer with their log-probabilities, and those of the likeliest tokens at their positions."""
    return [{**_scored(token), "top_logprobs": [_scored(one) for one in token.top]} for token in tokens]


def _scored(token: Logprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": finite(token), "bytes": list(token.bytes)}


def without_end(tokens: Iterable[TokenLogprobs], special_ids: frozenset[int]) -> list[TokenLogprobs]:
    """The tokens that are part of the text: not eos and other special tokens."""
    return [token for token in tokens if token.id not in special_ids]
