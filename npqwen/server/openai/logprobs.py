"""Log-probabilities in the formats of chat completions and of completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from npqwen.generation.completion import Logprob, TokenLogprobs

LEAST = -9999.0
"""OpenAI's number for a token that cannot occur; JSON has no infinity."""


def chat_logprobs(tokens: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities of a chat completion's choice, or of one of its chunks."""
    content = [{**_token(token), "top_logprobs": [_token(one) for one in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: Logprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": max(token.logprob, LEAST), "bytes": list(token.bytes)}


def text_logprobs(tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
    """Those of a completion's choice, or of one of its chunks. offset: characters of its text before the tokens."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [max(token.logprob, LEAST) for token in tokens],
        "top_logprobs": [{one.text: max(one.logprob, LEAST) for one in reversed(token.top)} for token in tokens],
        "text_offset": offsets,
    }


def without_end(tokens: Iterable[TokenLogprobs], special_ids: frozenset[int]) -> list[TokenLogprobs]:
    """The tokens that are part of the text: not eos and other special tokens."""
    return [token for token in tokens if token.id not in special_ids]
