"""Notices a text that says the same thing again and again, and ends its thought or the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from npqwen.generation.options import LoopGuard

if TYPE_CHECKING:
    from npqwen.generation.stream import Stream


class Repetition:
    """How far back a sequence of ids repeats itself, for every period at once; a few microseconds an id."""

    def __init__(self, longest: int) -> None:
        """longest: the longest period that is seen."""
        self._longest = longest
        self._past = np.full(3 * longest, -1, np.int64)
        self._at = 2 * longest
        """Where in `_past` the newest id is; older ones follow it."""
        self.runs = np.zeros(longest, np.int64)
        """runs[p - 1]: so many ids at the end equal the one p places before them."""

    def push(self, id: int) -> None:
        """The next id, 0 or more."""
        before = self._past[self._at : self._at + self._longest]
        self.runs += 1
        self.runs *= before == id
        if self._at == 0:
            self._past[-self._longest :] = before
            self._at = 2 * self._longest
        self._at -= 1
        self._past[self._at] = id

    def clear(self) -> None:
        """Forget all ids."""
        self._past[:] = -1
        self.runs[:] = 0


class LoopWatch:
    """Watches one `Stream` with a guard's thresholds: ends the thought that loops, or the text, as "loop"."""

    def __init__(self, guard: LoopGuard) -> None:
        self._repetition = Repetition(guard.longest_period)
        self._read = 0
        self._in_thought = False
        periods = np.arange(1, guard.longest_period + 1)
        copies = (guard.copies - 1) * periods
        self._thought_needs = np.maximum(copies, guard.thinking_tokens - periods)
        self._answer_needs = np.maximum(copies, guard.answer_tokens - periods)

    def __call__(self, stream: Stream) -> None:
        thinking = stream.thinking.is_open
        if thinking != self._in_thought:  # An answer that repeats what its thought said is no loop.
            self._in_thought = thinking
            self._repetition.clear()
            self._read = len(stream.ids)
        for id in stream.ids[self._read :]:
            self._repetition.push(id)
        self._read = len(stream.ids)
        needs = self._thought_needs if thinking else self._answer_needs
        if not (self._repetition.runs >= needs).any():
            return
        if thinking:
            stream.end_thinking("loop")
        else:
            stream.end("loop")
