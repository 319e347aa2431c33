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

    prompt: the ids before the text. Its last turn may begin the text: inside an open `<think>`, as the templates of
    models that always think do, or with more of an answer. In a prompt without turns, only the last tag counts.
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
        for id in self._begun(prompt):
            self.push(id)
        self.length = 0  # the prompt's tokens were not generated

    def _begun(self, prompt: Sequence[int]) -> Sequence[int]:
        """The ids at the end of a prompt that belong to the text."""
        turn = self._tokenizer.token_id(_TURN)
        backwards = range(len(prompt) - 1, -1, -1)
        start = next((at for at in backwards if prompt[at] == turn), None)
        if start is None:
            return next((prompt[at:] for at in backwards if prompt[at] in (self._open, self._close)), ())
        for at in range(start, len(prompt)):
            if b"\n" in self._tokenizer.token_bytes(prompt[at]):  # after the name of the role
                return prompt[at + 1 :]
        return ()

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
