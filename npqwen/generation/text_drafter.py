"""Drafts of a text's next tokens, copied from the text itself: from its prompt, its thinking and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

KEY = 3
"""There is a draft only if the text's last `KEY` tokens have occurred before."""
LONGEST = 32
"""The most tokens that are compared: a repetition of this length is sure to continue."""
_CANDIDATES = 16
"""The most earlier occurrences that are compared, the newest first."""
_BITS = 21
"""Bits of a token's id in a key."""
_KEY_MASK = (1 << KEY * _BITS) - 1


class Draft(NamedTuple):
    """Draft tokens, and how certain they are.

    certainty: a small integer, higher for more certain drafts. The recent acceptance rate of drafts of one certainty
    predicts that of the next one.
    """

    ids: list[int]
    certainty: int


class TextDrafter:
    """Finds the longest suffix of the text that occurred before, and proposes the tokens that followed it.

    Every occurrence of `KEY` tokens is linked to the previous one, in chains from the newest to the oldest, as in
    Lempel-Ziv compression; a step takes a few microseconds.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        """ids: the prompt's; a negative one separates texts that do not continue each other."""
        self._ids = list(ids)
        keys, before = _keys(self._ids)
        self._latest: dict[int, int] = dict(zip(keys, range(KEY, len(self._ids) + 1), strict=True))
        """Each key -> the index after its latest occurrence."""
        self._before: list[int] = [0] * KEY + before
        """For each index, the index after the previous occurrence of the key that ends there; 0 if there is none."""
        self._key = keys[-1] if keys else _key(self._ids)
        self._match = 0
        """The index after the latest earlier occurrence of the key at the end."""
        if keys:
            self._match = self._before[-1]

    def extend(self, ids: Iterable[int]) -> None:
        """Append the text's next tokens, drawn or forced."""
        for id in ids:
            self._ids.append(id)
            self._key = (self._key << _BITS | id & (1 << _BITS) - 1) & _KEY_MASK
            end = len(self._ids)
            if end < KEY:
                self._before.append(0)
                continue
            self._match = self._latest.get(self._key, 0)
            self._before.append(self._match)
            self._latest[self._key] = end

    def propose(self, most: int) -> Draft | None:
        """A draft of 1 to `most` tokens; None if the end of the text has not occurred before."""
        ids, at = self._ids, self._match
        if not at or most < 1:
            return None
        end = len(ids)
        best, longest = at, 0
        for _ in range(_CANDIDATES):
            length = KEY
            while length < LONGEST and length < at and ids[at - 1 - length] == ids[end - 1 - length]:
                length += 1
            if length > longest:
                best, longest = at, length
            at = self._before[at]
            if not at or longest == LONGEST:
                break
        period = end - best  # a draft longer than the period repeats it
        found = ids[best : best + most] if most <= period else [ids[best + i % period] for i in range(most)]
        for i, id in enumerate(found):
            if id < 0:
                found = found[:i]
                break
        return Draft(found, longest.bit_length()) if found else None


def _key(ids: Sequence[int]) -> int:
    """The key of fewer than `KEY` tokens, which `extend` continues."""
    key = 0
    for id in ids:
        key = (key << _BITS | id & (1 << _BITS) - 1) & _KEY_MASK
    return key


def _keys(ids: list[int]) -> tuple[list[int], list[int]]:
    """The key that ends at each token, starting at index KEY - 1, and the index after its previous occurrence, or 0."""
    count = len(ids) - KEY + 1
    if count < 1:
        return [], []
    parts = np.array(ids, np.int64) & (1 << _BITS) - 1
    keys = np.zeros(count, np.int64)
    for i in range(KEY):
        keys = keys << _BITS | parts[i : i + count]
    order = np.argsort(keys, kind="stable")
    repeated = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    before = np.zeros(count, np.int64)
    before[order[repeated + 1]] = order[repeated] + KEY
    return keys.tolist(), before.tolist()
