"""Statistics of a drafter's draft tokens, over all texts: how many were accepted, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from npqwen.format.encodings import UNIT_ROWS
from npqwen.generation.acceptance import Acceptance

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from npqwen.engine.pass_times import PassTimes

CATCH_UP = 32
"""The most tokens of the text that a drafter runs in one pass together with the first draft token."""
_CONFIDENCES = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
"""The boundaries of the kinds of draft tokens, by the drafter's own probability of them."""
_BELIEFS = (0.2, 0.4, 0.6, 0.75, 0.85, 0.95, 0.98)
"""The prior acceptance rate of each kind."""
_OVERALL = 0.7
"""The prior acceptance rate of all draft tokens."""
_FADES = 0.985
"""The weight of earlier evidence after a draft: higher than for drafts from the text, as a model's vary less."""
_WEIGHT = 1 / 8
RECENT = 512
"""The latest tokens of a text by which the part of the vocabulary is chosen."""
ENOUGH = 0.97
"""The share of the `RECENT` latest tokens that must be in a part of the vocabulary."""


class DraftToken(NamedTuple):
    """A token that was drafted."""

    id: int
    acceptance: Acceptance
    """The statistics of draft tokens of a similar probability by the drafter."""


class DraftStatistics:
    """Statistics of the draft tokens of one drafter."""

    def __init__(self, ratio: float) -> None:
        """ratio: the assumed cost of a draft token, in passes of one token of the target."""
        self.overall = Acceptance(_OVERALL, _FADES)
        """The acceptance of the next draft token, before its probability is known."""
        self._kinds = [Acceptance(belief, _FADES) for belief in _BELIEFS]
        self._ratio = min(1.0, ratio)
        self._seconds: float | None = None
        self.accepted = self.decided = self.passed_over = 0
        """Tokens that were accepted; tokens that were accepted or rejected; passes in which drafting did not pay."""

    def cost(self, passes: PassTimes | None) -> float:
        """The cost of a token, in the unit of the target's `passes`; from the models' sizes until it is measured."""
        if passes is None:
            return 0.0
        if self._seconds is None or not passes.measured:
            return self._ratio * passes.seconds[1]
        return self._seconds

    def add_seconds(self, seconds: float) -> None:
        """Update the average with the seconds of a token; more than twice the average counts as twice the average."""
        if self._seconds is None:
            self._seconds = seconds
        else:
            self._seconds += (min(seconds, 2 * self._seconds) - self._seconds) * _WEIGHT

    def best(self, logits: NDArray[np.float32]) -> DraftToken:
        """The likeliest token, given logits (ids,)."""
        return self.token(int(logits.argmax()), logits)

    def token(self, id: int, logits: NDArray[np.float32]) -> DraftToken:
        """The token `id`, given logits (ids,), of which its own is the greatest."""
        probability = 1 / float(np.exp(logits - logits[id]).sum())
        return DraftToken(id, self._kinds[int(np.searchsorted(_CONFIDENCES, probability))])

    def add(self, accepted: int, decided: int) -> None:
        """Count a draft. accepted: its accepted tokens. decided: those and the rejected one, if there was one."""
        self.overall.add(accepted, decided)
        self.accepted += accepted
        self.decided += decided

    def pass_over(self, pays: bool) -> None:
        """Count a pass without draft tokens. pays: whether drafting would have been better than nothing."""
        self.overall.fade()
        self.passed_over += not pays


def enough_ids(ids: Sequence[int], added: Collection[int], size: int, parts: Sequence[float]) -> int:
    """How many of the lowest ids a draft's logits need for most of the text's latest tokens to be among them.

    The lower an id, the more frequent is its token, and the output matrix is a large part of a small model. added: the
    tokenizer's added ids, which are the highest. size: of the vocabulary. parts: fractions of it, ascending.
    """
    recent = np.array([id for id in ids[-RECENT:] if id not in added])
    for part in parts:
        most = int(part * size) // UNIT_ROWS * UNIT_ROWS
        if most and recent.size and np.mean(recent < most) >= ENOUGH:
            return most
    return size
