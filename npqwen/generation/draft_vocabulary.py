"""The part of the vocabulary that a text's draft tokens are chosen from."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from npqwen.format.encodings import UNIT_ROWS
from npqwen.generation.draft_statistics import ENOUGH, RECENT

LATEST = 4096
"""The ids of this many latest tokens can be drafted, as far as there is room."""
MOST_GROUPS = 256
"""The most groups of UNIT_ROWS ids beside the lowest ids."""
_PARTS = (1 / 8, 1 / 4, 1 / 2)
"""Fractions of the vocabulary, its lowest ids, that may be enough."""


class DraftVocabulary:
    """The lowest ids, which are the most frequent tokens, and beyond them the ids of the text's latest tokens.

    The whole output matrix would be most of the work of drafting a token. Its rows are computed in groups of UNIT_ROWS.
    """

    def __init__(self, vocab_size: int, added: Collection[int]) -> None:
        """added: the tokenizer's added ids, which are the highest."""
        self._size = vocab_size
        self._added = np.array(sorted(added), np.int64)
        self._viewed = 0
        """The text's length when the ids were chosen."""
        self._lowest = 0
        self.groups = np.zeros(0, np.int64)
        """Groups beside the lowest ids, ascending."""
        self.logits = np.empty((1, 0), np.float32)
        """Receives logits: those of the lowest ids, then those of `groups`."""
        self._none = slice(0, 0)
        """The logits of padding rows of the output matrix, which belong to no token."""

    def follow(self, ids: Sequence[int]) -> None:
        """Choose the ids for the continuation of a text, unless it has hardly grown since the last choice."""
        if self._viewed and len(ids) < self._viewed + RECENT // 8:
            return
        self._viewed = len(ids)
        padded = -(-self._size // UNIT_ROWS) * UNIT_ROWS
        latest = np.array(ids[-LATEST:], np.int64)
        self._lowest = lowest = self._enough(latest, padded)
        further, newest = np.unique(latest[::-1] // UNIT_ROWS, return_index=True)
        beyond = further >= lowest // UNIT_ROWS
        further, newest = further[beyond], newest[beyond]
        self.groups = np.sort(further[np.argsort(newest)[:MOST_GROUPS]])
        self.logits = np.empty((1, lowest + UNIT_ROWS * self.groups.size), np.float32)
        ends = lowest == padded or (self.groups.size > 0 and self.groups[-1] == padded // UNIT_ROWS - 1)
        self._none = slice(self.logits.size - (padded - self._size if ends else 0), None)

    def best(self) -> int:
        """The index of the greatest of `logits`, after setting those of padding rows to -inf."""
        self.logits[0, self._none] = -np.inf
        return int(self.logits[0].argmax())

    def id(self, place: int) -> int:
        """The id whose logit is at index `place` of `logits`."""
        if place < self._lowest:
            return place
        group, row = divmod(place - self._lowest, UNIT_ROWS)
        return UNIT_ROWS * int(self.groups[group]) + row

    def _enough(self, latest: NDArray[np.int64], padded: int) -> int:
        """How many of the lowest ids are needed: most of the latest tokens are among them, or repeat earlier ones."""
        _, first, which = np.unique(latest // UNIT_ROWS, return_index=True, return_inverse=True)
        known = (first[which] < np.arange(latest.size)) | np.isin(latest, self._added)
        recent, known = latest[-RECENT:], known[-RECENT:]
        for part in _PARTS:
            most = int(part * padded) // UNIT_ROWS * UNIT_ROWS
            if most and recent.size and np.mean(known | (recent < most)) >= ENOUGH:
                return most
        return padded
