"""The cost of passes of several tokens relative to passes of one, measured as they run."""

from __future__ import annotations

MEASURED = 16
"""Passes of up to this many tokens are measured."""
_DENSE, _SPARSE = 0.04, 0.5
"""Assumed cost of each further token, in units of a one-token pass, until it is measured. In a mixture of experts every
token reads further experts."""
_SMOOTHING = 1 / 8
"""The least weight of a new duration in its moving average."""
_MAX_RATIO = 2.0
"""A longer duration, in units of the average, counts as this."""
_RECOMPUTE_EVERY = 16
"""Passes after which the table is recomputed."""
_DECAY = 1 / 16
"""Fraction of its distance from the assumed value that a mean loses each time, if it was not measured since the last.
"""


class PassTimes:
    """Moving averages of the seconds of passes that compute every token's logits, by their number of tokens.

    A pass that takes more than _MAX_RATIO times the mean counts as that: something else kept the machine busy.
    """

    def __init__(self, *, sparse: bool) -> None:
        """sparse: whether the model is a mixture of experts."""
        further = _SPARSE if sparse else _DENSE
        self._assumed = [1 + further * (tokens - 1) for tokens in range(MEASURED + 1)]
        self._means: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._table = self._assumed
        self._added = 0
        self._measured_since: set[int] = set()
        """Numbers of tokens that were measured since the table was computed."""

    def add(self, tokens: int, seconds: float) -> None:
        """Add the duration of a pass of this many tokens; passes of more than `MEASURED` are ignored."""
        if not 0 < tokens <= MEASURED:
            return
        mean = self._means.get(tokens)
        self._added += 1
        if mean is None:
            self._means[tokens] = seconds
        else:
            weight = max(_SMOOTHING, 1 / (1 + self._counts[tokens]))
            self._means[tokens] = mean + (min(seconds, _MAX_RATIO * mean) - mean) * weight
        self._counts[tokens] = self._counts.get(tokens, 0) + 1
        self._measured_since.add(tokens)
        if self._counts[tokens] < 1 / _SMOOTHING or self._added % _RECOMPUTE_EVERY == 0:
            self._decay()
            # A rarely measured number may have been measured while the machine was busy: larger passes cap it.
            estimates = [self._estimate(tokens) for tokens in range(MEASURED + 1)]
            self._table = [min(estimates[tokens:]) for tokens in range(MEASURED + 1)]

    @property
    def measured(self) -> bool:
        """Whether any pass has been measured, so that `seconds` are seconds."""
        return bool(self._means)

    @property
    def seconds(self) -> list[float]:
        """seconds[n]: of a pass of n tokens, up to `MEASURED`; in units of a one-token pass before any is measured.

        Measured, or estimated from measured passes of fewer and more tokens.
        """
        return self._table

    def _decay(self) -> None:
        """Move means not measured lately toward their assumed values: the machine may have been busy then."""
        alone = self._means.get(1)
        if alone is not None and self._added % _RECOMPUTE_EVERY == 0:
            for tokens in self._means.keys() - self._measured_since:
                self._means[tokens] += (alone * self._assumed[tokens] - self._means[tokens]) * _DECAY
            self._measured_since.clear()

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
        return self._means[nearest] * self._assumed[tokens] / self._assumed[nearest]
