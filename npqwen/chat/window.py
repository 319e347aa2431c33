"""The part of a long conversation that fits the context."""

from __future__ import annotations

from collections.abc import Callable

from npqwen.chat.messages import Message
from npqwen.generation.decoding import too_long

_ROOM = 1024
"""Minimum room for an answer, in tokens; a quarter of the context if that is smaller."""


class Window:
    """Drops the oldest turns of a conversation that exceeds the context.

    A turn is a user's message and everything up to the next one. Only whole turns are dropped, never the system message
    and never the last turn. The rest of the conversation has to be computed again each time, so enough turns are
    dropped to leave a quarter of the context free.

    encode: converts messages to a prompt's ids. context: maximum tokens of prompt and answer. max_tokens: of the
    answer, or None.
    """

    def __init__(self, encode: Callable[[list[Message]], list[int]], context: int, max_tokens: int | None) -> None:
        self._encode = encode
        self._context = context
        self._room = min(max_tokens or _ROOM, context // 4)

    def fit(self, messages: list[Message], dropped: int) -> tuple[list[int], int]:
        """The prompt's ids, and the number of messages after the system message that are left out of it.

        dropped: that number so far; the result is not smaller. Raises ContextLengthError if the last turn alone does
        not fit.
        """
        ids = self._encode(shown(messages, dropped))
        if len(ids) + self._room <= self._context:
            return ids, dropped
        first = _system(messages)
        starts = [at for at in range(first + dropped + 1, len(messages)) if messages[at]["role"] == "user"]
        low, high = 0, len(starts) - 1
        while low < high:  # binary search for the first start that leaves enough room
            middle = (low + high) // 2
            if self._is_short(self._encode(shown(messages, starts[middle] - first))):
                high = middle
            else:
                low = middle + 1
        if starts:
            dropped = starts[low] - first
            ids = self._encode(shown(messages, dropped))
        if len(ids) >= self._context:
            what = "turn" if messages[-1]["role"] == "tool" else "message"
            takes = "with the system message it takes" if _system(messages) else "it takes"
            raise too_long(f"this {what}", takes, len(ids), self._context)
        return ids, dropped

    def _is_short(self, ids: list[int]) -> bool:
        return len(ids) + self._room <= self._context - self._context // 4


def shown(messages: list[Message], dropped: int) -> list[Message]:
    """`messages` without the first `dropped` after the system message."""
    first = _system(messages)
    return messages[:first] + messages[first + dropped :]


def _system(messages: list[Message]) -> int:
    """1 if the conversation begins with a system message, else 0."""
    return int(bool(messages) and messages[0]["role"] == "system")
