"""The hidden states of a text's latest tokens, kept as they are computed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

KEPT = 256
"""Fewest latest tokens, rejected draft tokens included, whose states are kept."""


class HiddenTail:
    """The last layer's output for the latest tokens, before the final norm.

    first, end: positions in the text; the states from `first` to `end` - 1 are kept.
    """

    def __init__(self, hidden_size: int) -> None:
        self._rows = np.empty((2 * KEPT, hidden_size), np.float32)
        self._start = 0
        """The position of the first row."""
        self.first = self.end = 0

    def add(self, start: int, states: NDArray[np.float32]) -> None:
        """Append the states (tokens, hidden_size) of tokens at positions starting at `start`, replacing any from there.

        After a gap, or if these are at least KEPT, earlier ones are dropped.
        """
        if not self.first <= start <= self.end or len(states) >= KEPT:
            start += max(0, len(states) - KEPT)
            states = states[-KEPT:]
            self.first = self._start = start
        count = len(states)
        if start + count - self._start > len(self._rows):
            first = max(self.first, start + count - KEPT)
            self._rows[: start - first] = self._rows[first - self._start : start - self._start]
            self.first = self._start = first
        self._rows[start - self._start : start - self._start + count] = states
        self.end = start + count

    def rows(self, start: int, end: int) -> NDArray[np.float32]:
        """A view of the states of some positions, all of them kept: (end - start, hidden_size)."""
        return self._rows[start - self._start : end - self._start]
