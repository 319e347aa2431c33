"""How often draft tokens are accepted."""

from __future__ import annotations

_PRIOR_WEIGHT = 1.0
"""The weight of the prior, in tokens."""
_UNCERTAIN_DECAY = 0.98
"""The weight of earlier evidence after a draft token that was too uncertain to be run."""


class Acceptance:
    """The recent acceptance rate of draft tokens of one kind."""

    def __init__(self, prior: float, decay: float = 0.93) -> None:
        """prior: the prior acceptance rate. decay: the weight of earlier evidence after each draft."""
        self._prior = prior
        self._decay = decay
        self._accepted = self._decided = 0.0

    @property
    def rate(self) -> float:
        """The probability that a draft token is accepted if those before it are."""
        return (self._accepted + _PRIOR_WEIGHT * self._prior) / (self._decided + _PRIOR_WEIGHT)

    def add(self, accepted: int, decided: int) -> None:
        """Count a draft. accepted: its accepted tokens. decided: those and the rejected one, if there was one."""
        self._accepted = self._accepted * self._decay + accepted
        self._decided = self._decided * self._decay + decided

    def fade(self) -> None:
        """Discount earlier evidence a little, so that drafts that did not pay are eventually tried again."""
        self._accepted *= _UNCERTAIN_DECAY
        self._decided *= _UNCERTAIN_DECAY
