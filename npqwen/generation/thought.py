"""Where a text is in its thought: before `<think>`, inside, or after `</think>`."""

from __future__ import annotations

from collections.abc import Sequence

from npqwen.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
_TURN = "<|im_start|>"


class ThinkingTracker:
    """Follows the ids of one text. A text has one thought, at its beginning: later marks mean nothing.

    prompt: the ids before the text. It may end in an open thought, as templates of models that always think make
    it; marks in earlier turns do not count.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._open, self._close = tokenizer.token_id(OPEN), tokenizer.token_id(CLOSE)
        self.is_open = False
        """Whether the next token belongs to the thought, or ends it."""
        self.is_over = False
        """Whether it has ended, or the text began without one."""
        self.length = 0
        """Generated tokens of the thought, its marks not counted."""
        turn = tokenizer.token_id(_TURN)
        for id in reversed(prompt):
            if id == self._open:
                self.is_open = True
            elif id == self._close:
                self.is_over = True
            if id in (turn, self._open, self._close):
                break

    def push(self, id: int) -> None:
        """The next id of the text."""
        if self.is_open and id == self._close:
            self.is_open, self.is_over = False, True
        elif self.is_open:
            self.length += 1
        elif not self.is_over:
            self.is_open = id == self._open
            self.is_over = not self.is_open and bool(self._tokenizer.token_bytes(id).strip())
