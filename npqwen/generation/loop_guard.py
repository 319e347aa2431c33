"""The loop guard: finds thinking, or a text, that keeps repeating itself, and ends it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from npqwen.checks import check_whole
from npqwen.generation.watched import Watched


@dataclass(frozen=True)
class LoopGuard:
    """When a repetition is a loop.

    The last tokens of the text must repeat one run of at most `longest_period` tokens, at least `copies` times; all
    copies together must be at least `thinking_tokens` long while the model thinks, `answer_tokens` otherwise. Tables,
    matrices of zeros, refrains and "ha ha ha" stay far below the defaults.
    """

    thinking_tokens: int = 512
    answer_tokens: int = 1024
    copies: int = 4
    longest_period: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            check_whole(field.name, getattr(self, field.name), 2 if field.name == "copies" else 1, 2**20)


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


class Repetition:
    """How far back a sequence of ids repeats itself, for every period at once; a few microseconds an id."""

    def __init__(self, longest: int) -> None:
        """longest: the longest period to look for."""
        self._longest = longest
        self._past = np.full(3 * longest, -1, np.int64)
        self._newest = 2 * longest
        """Index in `_past` of the newest id; older ones follow it."""
        self.runs = np.zeros(longest, np.int64)
        """runs[p - 1]: how many ids at the end equal the id p positions before them."""

    def push(self, id: int) -> None:
        """Take the next id, 0 or more."""
        before = self._past[self._newest : self._newest + self._longest]
        self.runs += 1
        self.runs *= before == id
        if self._newest == 0:
            self._past[-self._longest :] = before
            self._newest = 2 * self._longest
        self._newest -= 1
        self._past[self._newest] = id

    def clear(self) -> None:
        """Forget all ids."""
        self._past[:] = -1
        self.runs[:] = 0
