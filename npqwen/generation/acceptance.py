"""How often draft tokens are accepted."""

from __future__ import annotations

_WEIGHT = 1.0
"""The weight of the prior, in tokens."""
_RECOVERS = 0.98
"""The weight of earlier evidence after a draft token that was too uncertain to be run."""


class Acceptance:
    """The recent acceptance rate of draft tokens of one kind."""

    def __init__(self, belief: float, fades: float = 0.93) -> None:
        """belief: the prior acceptance rate. fades: the weight of earlier evidence after each draft."""
        self._belief = belief
        self._fades = fades
        self._accepted = self._decided = 0.0

    @property
    def rate(self) -> float:
        """The probability that a draft token is accepted if those before it are."""
        return (self._accepted + _WEIGHT * self._belief) / (self._decided + _WEIGHT)

    def add(self, accepted: int, decided: int) -> None:
        """Count a draft. accepted: its accepted tokens. decided: those and the rejected one, if there was one."""
        self._accepted = self._accepted * self._fades + accepted
        self._decided = self._decided * self._fades + decided

    def fade(self) -> None:
        """Discount earlier evidence a little, so that drafts that did not pay are eventually tried again."""
        self._accepted *= _RECOVERS
        self._decided *= _RECOVERS
