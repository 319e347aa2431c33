"""Whether, and how far, one text's next tokens are guessed: what pays by what was accepted and what passes cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from npqwen.generation.drafter import Draft, Drafter, TextDrafter

if TYPE_CHECKING:
    from npqwen.engine.pass_times import PassTimes

PASS = 15
"""The most tokens of a pass with drafts. Passes of so many are the same to the bit as passes of one."""
MARGIN = 1.05
"""Drafting must promise so many times the tokens per second of plain passes."""
_BELIEFS = {2: 0.5, 3: 0.65, 4: 0.8, 5: 0.9, 6: 0.95}
"""The share of tokens believed to be accepted, by certainty, before anything is known."""
_BELIEF_WEIGHT = 1.0
"""How many tokens' evidence that is worth."""
_FADES, _RECOVERS = 0.93, 0.98
"""What earlier evidence is worth after a draft of the same certainty, and after one that was too unsure to be run."""


class Acceptance:
    """How many of the proposed tokens are accepted, lately."""

    def __init__(self, belief: float) -> None:
        self._belief = belief
        self._accepted = self._decided = 0.0

    @property
    def rate(self) -> float:
        """The probability that a proposed token is accepted if those before it are."""
        return (self._accepted + _BELIEF_WEIGHT * self._belief) / (self._decided + _BELIEF_WEIGHT)

    def add(self, accepted: int, decided: int) -> None:
        """Count a draft of which this many tokens were accepted, and so many compared, a rejected one included."""
        self._accepted = self._accepted * _FADES + accepted
        self._decided = self._decided * _FADES + decided

    def fade(self) -> None:
        """Forget a little, so that what did not pay is tried again some time."""
        self._accepted *= _RECOVERS
        self._decided *= _RECOVERS


class Speculation:
    """Proposes the tokens that a text's next pass runs beyond those that are certain, and learns what came of them.

    The text does not depend on it: a proposed token is used only where it equals the one that is drawn.
    """

    def __init__(self, drafter: Drafter, passes: PassTimes | None, *, always: bool = False) -> None:
        """passes: what passes cost. always: draft wherever there is an idea; otherwise where it pays by `passes`."""
        self._drafter = drafter
        self._passes = passes
        self._always = always
        self._read = 0
        self._acceptance: dict[int, Acceptance] = {}
        self._certainty = 0

    def propose(self, ids: Sequence[int], most: int, others: int) -> list[int]:
        """The next tokens to guess, at most `most`, perhaps none.

        ids: the text's. others: how many tokens the pass runs anyway.
        """
        self._drafter.extend(ids[self._read :])
        self._read = len(ids)
        most = min(most, PASS - others)
        if most < 1:
            return []
        draft = self._drafter.propose(most)
        if draft is None:
            return []
        self._certainty = draft.certainty
        acceptance = self._acceptance_of(draft)
        length = self._best_length(acceptance.rate, len(draft.ids), others)
        if not length:
            acceptance.fade()
        return draft.ids[:length]

    def learn(self, accepted: int, decided: int) -> None:
        """Take what came of the last proposal: tokens that were accepted, and tokens that were compared."""
        if decided:
            self._acceptance[self._certainty].add(accepted, decided)

    def _acceptance_of(self, draft: Draft) -> Acceptance:
        return self._acceptance.setdefault(draft.certainty, Acceptance(_BELIEFS[draft.certainty]))

    def _best_length(self, rate: float, most: int, others: int) -> int:
        """How many tokens give the most tokens per second, if each is accepted at this rate; 0 if none pays."""
        best, best_speed = (1, 0.0) if self._always else (0, MARGIN)
        seconds = [1.0] * (PASS + 1) if self._passes is None else self._passes.seconds
        tokens, chance, alone = 1.0, 1.0, seconds[others]
        for length in range(1, most + 1):
            chance *= rate
            tokens += chance
            speed = tokens * alone / seconds[others + length]
            if speed > best_speed:
                best, best_speed = length, speed
        return best


def speculation_for(
    wanted: bool | None, passes: PassTimes | None, prompt: Sequence[int]
) -> Speculation | None:
    """The speculation of a text; None if there is none. wanted: the option `speculation`."""
    if wanted is False or (wanted is None and passes is None):
        return None
    return Speculation(TextDrafter(prompt), passes, always=wanted is True)
