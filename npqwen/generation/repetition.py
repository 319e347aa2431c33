"""How far back a growing sequence of ids repeats itself."""

import numpy as np


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
