"""Log-probabilities in the formats of chat completions and of completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from npqwen.generation.completion import TokenLogprobs
from npqwen.server.logprobs import finite, scored_tokens


def chat_logprobs(tokens: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities of a chat completion's choice, or of one of its chunks."""
    return {"content": scored_tokens(tokens), "refusal": None}


class TextLogprobs:
    """Writes those of a completion's choice, whole or chunk by chunk."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = 0
        """Complete characters of the tokens so far."""

    def __call__(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The next tokens' log-probabilities."""
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [finite(token) for token in tokens],
            "top_logprobs": [{one.text: finite(one) for one in reversed(token.top)} for token in tokens],
            "text_offset": [self._offset(token.bytes) for token in tokens],
        }

    def _offset(self, token: bytes) -> int:
        """Take the next token; returns the index of the character that its first byte is part of."""
        first, rest = token[:1], token[1:]
        self._length += len(self._utf8.decode(first))
        is_complete = first and not self._utf8.getstate()[0]
        offset = self._length - 1 if is_complete else self._length
        self._length += len(self._utf8.decode(rest))
        return offset
