"""Functions that watch a text as it is generated and may end its thinking, or the text: the budget and loop guard."""

from __future__ import annotations

import numpy as np

from npqwen.generation.loop_guard import LoopGuard
from npqwen.generation.options import GenerationOptions
from npqwen.generation.repetition import Repetition
from npqwen.generation.watched import EndedBy, Watch, Watched

_LONGEST_CHARACTER = 4
"""The most bytes of one character in UTF-8, and so the most tokens that it can take."""


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

    by: who ends it, for the text's `thinking_ended_by`.
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


class LoopWatch:
    """Ends thinking that repeats itself by the guard's thresholds, and a text that does so with the reason "loop"."""

    def __init__(self, guard: LoopGuard) -> None:
        self._repetition = Repetition(guard.longest_period)
        self._read = 0
        self._in_thinking = False
        periods = np.arange(1, guard.longest_period + 1)
        copies = (guard.copies - 1) * periods
        self._thinking_limits = np.maximum(copies, guard.thinking_tokens - periods)
        self._answer_limits = np.maximum(copies, guard.answer_tokens - periods)

    def __call__(self, text: Watched) -> None:
        thinking = text.thinking.is_open
        if thinking != self._in_thinking:  # an answer that repeats its own thinking is not a loop
            self._in_thinking = thinking
            self._repetition.clear()
            self._read = len(text.ids)
        for id in text.ids[self._read :]:
            self._repetition.push(id)
        self._read = len(text.ids)
        limits = self._thinking_limits if thinking else self._answer_limits
        if not (self._repetition.runs >= limits).any():
            return
        if thinking:
            text.end_thinking("loop")
        else:
            text.end("loop")
