"""How often guessed tokens turn out to be right."""

from __future__ import annotations

_WEIGHT = 1.0
"""How many tokens' evidence the belief is worth."""
_RECOVERS = 0.98
"""What earlier evidence is worth after a guess that was too unsure to be run."""


class Acceptance:
    """How many of the guessed tokens of one kind are accepted, lately."""

    def __init__(self, belief: float, fades: float = 0.93) -> None:
        """belief: the share that is accepted, before anything is known. fades: what earlier evidence is worth after new
        one."""
        self._belief = belief
        self._fades = fades
        self._accepted = self._decided = 0.0

    @property
    def rate(self) -> float:
        """The probability that a guessed token is accepted if those before it are."""
        return (self._accepted + _WEIGHT * self._belief) / (self._decided + _WEIGHT)

    def add(self, accepted: int, decided: int) -> None:
        """Count a draft. accepted: its accepted tokens. decided: those and the rejected one, if there was one."""
        self._accepted = self._accepted * self._fades + accepted
        self._decided = self._decided * self._fades + decided

    def fade(self) -> None:
        """Forget a little, so that what did not pay is tried again some time."""
        self._accepted *= _RECOVERS
        self._decided *= _RECOVERS
