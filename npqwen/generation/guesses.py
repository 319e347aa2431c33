"""What has become known of a drafter's guesses, in all texts: how many were right, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from npqwen.format.encodings import UNIT_ROWS
from npqwen.generation.acceptance import Acceptance

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from npqwen.engine.pass_times import PassTimes

_CONFIDENCES = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
"""Between these, a guess's probability by the drafter puts it into one kind."""
_BELIEFS = (0.2, 0.4, 0.6, 0.75, 0.85, 0.95, 0.98)
"""Of each kind, the share believed to be accepted before anything is known."""
_OVERALL = 0.7
"""The share of all guesses believed to be accepted before anything is known."""
_FADES = 0.985
"""What earlier evidence is worth after a draft: what a model guesses is more alike than what a text repeats."""
_WEIGHT = 1 / 8
RECENT = 512
"""Tokens that choose the part of the vocabulary."""
ENOUGH = 0.97
"""This share of as many recent tokens has to be in a part of the vocabulary."""


class Guess(NamedTuple):
    """A guessed token."""

    id: int
    acceptance: Acceptance
    """Of guesses that the drafter was as sure of."""


class Guesses:
    """Of one drafter."""

    def __init__(self, ratio: float) -> None:
        """ratio: what a guess is believed to cost, in passes of one token."""
        self.overall = Acceptance(_OVERALL, _FADES)
        """Of the next guess, before its probability is known."""
        self._kinds = [Acceptance(belief, _FADES) for belief in _BELIEFS]
        self._ratio = min(1.0, ratio)
        self._seconds: float | None = None
        self.accepted = self.decided = self.passed_over = 0
        """Guesses that were accepted, and that were compared at all; passes in which guessing did not pay."""

    def cost(self, passes: PassTimes | None) -> float:
        """What a guess takes, in the unit of the target's `passes`; by the models' sizes until it is measured."""
        if passes is None:
            return 0.0
        if self._seconds is None or not passes.measured:
            return self._ratio * passes.seconds[1]
        return self._seconds

    def measured(self, seconds: float) -> None:
        """Count a guess that took so long; one that took far longer than usual counts as twice as long."""
        if self._seconds is None:
            self._seconds = seconds
        else:
            self._seconds += (min(seconds, 2 * self._seconds) - self._seconds) * _WEIGHT

    def best(self, logits: NDArray[np.float32]) -> Guess:
        """The likeliest token by logits (ids,)."""
        return self.guess(int(logits.argmax()), logits)

    def guess(self, id: int, logits: NDArray[np.float32]) -> Guess:
        """The token `id`, by logits (ids,) that are nowhere greater than its own."""
        probability = 1 / float(np.exp(logits - logits[id]).sum())
        return Guess(id, self._kinds[int(np.searchsorted(_CONFIDENCES, probability))])

    def add(self, accepted: int, decided: int) -> None:
        """Count a draft. accepted: its accepted tokens. decided: those and the rejected one, if there was one."""
        self.overall.add(accepted, decided)
        self.accepted += accepted
        self.decided += decided

    def pass_over(self, pays: bool) -> None:
        """Count a pass without guesses. pays: whether guessing would have been better than nothing."""
        self.overall.fade()
        self.passed_over += not pays


def enough_ids(ids: Sequence[int], added: Collection[int], size: int, parts: Sequence[float]) -> int:
    """How many of the lowest ids a draft's logits need: most of the text's latest tokens are among them.

    The lower an id, the more frequent is its token, and the output matrix is a large part of a small model. added: the
    tokenizer's added ids, which are the highest. size: of the vocabulary. parts: of it, from the least on.
    """
    recent = np.array([id for id in ids[-RECENT:] if id not in added])
    for part in parts:
        most = int(part * size) // UNIT_ROWS * UNIT_ROWS
        if most and recent.size and np.mean(recent < most) >= ENOUGH:
            return most
    return size
