"""Ends a thought that has become too long, in Qwen's own words, so that the answer follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npqwen.errors import OptionError
from npqwen.generation.thought import CLOSE

if TYPE_CHECKING:
    from npqwen.generation.stream import Stream
    from npqwen.tokenizer import Tokenizer

ENDING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    f"\n{CLOSE}\n\n"
)
"""What Qwen3 was trained to end a thought with that was cut short (QwenLM/Qwen3, thinking_budget.md)."""
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, and so tokens at most."""


class ThinkingBudget:
    """Watches a `Stream`: after `tokens` of thought it forces `ENDING`.

    A thought that ends by itself, and a text without one, are left alone. The tokens between the thought's marks
    count; a few more are let through if they complete a character.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, stream: Stream) -> None:
        over = stream.thinking.length - self.tokens
        if over < 0 or not stream.thinking.is_open:
            return
        if not stream.within_character or over >= _LONGEST_CHARACTER:
            stream.end_thinking("budget")


def ending_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of `ENDING`; OptionError if the tokenizer has no mark for a thought's end."""
    if tokenizer.token_id(CLOSE) is None:
        raise OptionError(f"this model's tokenizer has no {CLOSE}: its thoughts cannot be ended")
    return tokenizer.encode(ENDING)
