"""Functions that watch a text as it is generated and may end its thinking, or the text: the budget and loop guard."""

from __future__ import annotations

from npqwen.generation.loop_guard import LoopGuard, LoopWatch
from npqwen.generation.options import GenerationOptions
from npqwen.generation.watched import EndedBy, Watch, Watched

_LONGEST_CHARACTER = 4
"""Bytes of one character in UTF-8, and so the most tokens it can take."""


def option_watches(options: GenerationOptions) -> list[Watch]:
    """New watches for one text with these options, which are checked."""
    watches: list[Watch] = []
    budget, guard = options.get("thinking_budget"), options.get("loop_guard")
    if budget is not None:
        watches.append(ThinkingBudget(budget))
    if guard:
        watches.append(LoopWatch(guard if isinstance(guard, LoopGuard) else LoopGuard()))
    return [*watches, *(options.get("watch") or ())]


class ThinkingBudget:
    """Ends the thinking after `tokens` tokens, tags not counted; a few more if they complete a character.

    by: who ends it, as the text's `thinking_ended_by` will tell.
    """

    def __init__(self, tokens: int, by: EndedBy = "budget") -> None:
        self.tokens = tokens
        self._by = by

    def __call__(self, text: Watched) -> None:
        over = text.thinking.length - self.tokens
        if over < 0 or not text.thinking.is_open:
            return
        if not text.within_character or over >= _LONGEST_CHARACTER:
            text.end_thinking(self._by)
