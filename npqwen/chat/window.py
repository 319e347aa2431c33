"""Which messages of a long conversation the model sees: those that fit its context."""

from __future__ import annotations

from collections.abc import Callable

from npqwen.chat.messages import Message
from npqwen.errors import ContextLengthError

_ROOM = 1024
"""Tokens that an answer gets at least, if a quarter of the context is not less."""


class Window:
    """Drops the oldest turns of a conversation once it is longer than the context.

    A turn is a user's message and all that follows it up to the next one. Turns go whole, the oldest first, the system
    message stays, and nothing is ever cut inside a message. When one has to go, so many go that a quarter of the
    context is free for answers to come: each time, what stays has to be read anew. The last turn never goes.

    encode: messages to a prompt's ids. context: tokens for prompt and answer. max_tokens: of the answer, or None.
    """

    def __init__(self, encode: Callable[[list[Message]], list[int]], context: int, max_tokens: int | None) -> None:
        self._encode = encode
        self._context = context
        self._room = min(max_tokens or _ROOM, context // 4)

    def fit(self, messages: list[Message], dropped: int) -> tuple[list[int], int]:
        """The prompt's ids, and how many messages after the system message are left out of it.

        dropped: that number so far; it only grows. Raises ContextLengthError if the last turn alone does not fit.
        """
        ids = self._encode(shown(messages, dropped))
        if len(ids) + self._room <= self._context:
            return ids, dropped
        first = _system(messages)
        starts = [at for at in range(first + dropped + 1, len(messages)) if messages[at]["role"] == "user"]
        low, high = 0, len(starts) - 1
        while low < high:  # The more go, the shorter it is: the first start that leaves enough room.
            middle = (low + high) // 2
            if self._is_short(self._encode(shown(messages, starts[middle] - first))):
                high = middle
            else:
                low = middle + 1
        if starts:
            dropped = starts[low] - first
            ids = self._encode(shown(messages, dropped))
        if len(ids) >= self._context:
            raise ContextLengthError(
                f"the last turn alone, with the system message, takes {len(ids)} tokens and the context is "
                f"{self._context}; shorten the message, or load the model with a longer context if it allows one"
            )
        return ids, dropped

    def _is_short(self, ids: list[int]) -> bool:
        return len(ids) + self._room <= self._context - self._context // 4


def shown(messages: list[Message], dropped: int) -> list[Message]:
    """The messages without the oldest `dropped` after the system message."""
    first = _system(messages)
    return messages[:first] + messages[first + dropped :]


def _system(messages: list[Message]) -> int:
    """1 if the conversation begins with a system message, else 0."""
    return int(bool(messages) and messages[0]["role"] == "system")
