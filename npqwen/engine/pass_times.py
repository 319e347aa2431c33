"""What passes of several tokens cost, compared with passes of one: measured as they run."""

from __future__ import annotations

MEASURED = 16
"""Passes of up to this many tokens are measured."""
_DENSE, _SPARSE = 0.04, 0.5
"""What each further token is believed to cost, in passes of one, until it is measured. In a mixture of experts every
token reads further experts."""
_WEIGHT = 1 / 8
_OUTLIER = 2.0
_RENEWED = 16
"""Passes after which the table is computed again."""


class PassTimes:
    """Moving averages of the seconds that passes take, by their number of tokens; each token's logits are computed.

    A pass that took twice as long as usual counts as no longer than that: something else kept the machine busy.
    """

    def __init__(self, *, sparse: bool) -> None:
        """sparse: whether the model is a mixture of experts."""
        further = _SPARSE if sparse else _DENSE
        self._believed = [1 + further * (tokens - 1) for tokens in range(MEASURED + 1)]
        self._means: dict[int, float] = {}
        self._table = self._believed
        self._added = 0

    def add(self, tokens: int, seconds: float) -> None:
        """Count a pass of this many tokens; one of more than `MEASURED` is left out."""
        if not 0 < tokens <= MEASURED:
            return
        mean = self._means.get(tokens)
        self._added += 1
        if mean is None:
            self._means[tokens] = seconds
        else:
            self._means[tokens] = mean + (min(seconds, _OUTLIER * mean) - mean) * _WEIGHT
        if mean is None or self._added % _RENEWED == 0:
            self._table = [self._estimate(tokens) for tokens in range(MEASURED + 1)]

    @property
    def measured(self) -> bool:
        """Whether `seconds` are seconds."""
        return bool(self._means)

    @property
    def seconds(self) -> list[float]:
        """seconds[n]: of a pass of n tokens, up to `MEASURED`; in passes of one token before any is measured.

        Measured, or estimated from shorter and longer ones that were.
        """
        return self._table

    def _estimate(self, tokens: int) -> float:
        mean = self._means.get(tokens)
        if mean is not None:
            return mean
        below = max((known for known in self._means if known < tokens), default=None)
        above = min((known for known in self._means if known > tokens), default=None)
        if below is not None and above is not None:
            share = (tokens - below) / (above - below)
            return self._means[below] + share * (self._means[above] - self._means[below])
        nearest = above if below is None else below
        assert nearest is not None  # something has been measured
        return self._means[nearest] * self._believed[tokens] / self._believed[nearest]
