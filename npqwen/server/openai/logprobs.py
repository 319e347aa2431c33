"""Log-probabilities in the formats of chat completions and of completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from npqwen.generation.completion import TokenLogprobs
from npqwen.server.logprobs import finite, scored_tokens


def chat_logprobs(tokens: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities of a chat completion's choice, or of one of its chunks."""
    return {"content": scored_tokens(tokens), "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
    """Those of a completion's choice, or of one of its chunks. offset: characters of its text before the tokens."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [finite(token) for token in tokens],
        "top_logprobs": [{one.text: finite(one) for one in reversed(token.top)} for token in tokens],
        "text_offset": offsets,
    }
