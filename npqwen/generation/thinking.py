"""Where a text is in its thinking: before `<think>`, inside, or after `</think>`; and how to end it early."""

from __future__ import annotations

from collections.abc import Sequence

from npqwen.errors import OptionError
from npqwen.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
_TURN = "<|im_start|>"
ENDING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    f"\n{CLOSE}\n\n"
)
"""The text with which Qwen3 was trained to end thinking that is cut short (QwenLM/Qwen3, thinking_budget.md)."""


class ThinkingTracker:
    """Follows the ids of one text, which thinks at most once, at its beginning; later tags have no meaning.

    prompt: the ids before the text. It may end inside an open `<think>`, as in the templates of models that always
    think; tags in earlier turns do not count.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._open, self._close = tokenizer.token_id(OPEN), tokenizer.token_id(CLOSE)
        self.is_open = False
        """Whether the next token is part of the thinking, or ends it."""
        self.is_over = False
        """Whether the thinking has ended, or the text began without it."""
        self.length = 0
        """Generated tokens of the thinking, without its tags."""
        turn = tokenizer.token_id(_TURN)
        for id in reversed(prompt):
            if id == self._open:
                self.is_open = True
            elif id == self._close:
                self.is_over = True
            if id in (turn, self._open, self._close):
                break

    def push(self, id: int) -> None:
        """Take the next id of the text."""
        if self.is_open and id == self._close:
            self.is_open, self.is_over = False, True
        elif self.is_open:
            self.length += 1
        elif not self.is_over:
            self.is_open = id == self._open
            self.is_over = not self.is_open and bool(self._tokenizer.token_bytes(id).strip())


def ending_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of `ENDING`; OptionError if the tokenizer has no `</think>`."""
    if tokenizer.token_id(CLOSE) is None:
        raise OptionError(f"this model's tokenizer has no {CLOSE} token, so its thinking cannot be ended")
    return tokenizer.encode(ENDING)
