"""Logits to the next token: bias, penalties, temperature, top-k, top-p, min-p, and one draw.

The order is that of Hugging Face transformers: bias, repetition penalty, presence and frequency penalty, the
caller's own processor, temperature, top-k, top-p, min-p, each on what the one before it left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import FormatError, OptionError
from npqwen.generation.options import LogitsProcessor
from npqwen.generation.sampling import Sampling
from npqwen.kernels.compiled import compile_kernel
from npqwen.kernels.greatest import BLOCK, select

MANY = 500
"""More than these are found by sorting, and drawn from by NumPy."""
_NO_WEIGHT = 750.0
"""exp(-746) is 0: logits that are temperatures of so many below the greatest are never drawn."""


class Sampler:
    """Draws tokens for one text.

    prompt: the ids before it, for the repetition penalty and for `processor`.
    forbidden: ids that are never drawn, such as embedding rows without a token.
    processor: the caller's own change of the logits, after bias and penalties and before the temperature.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int] = (),
        forbidden: NDArray[np.intp] | None = None,
        processor: LogitsProcessor | None = None,
    ) -> None:
        self.sampling = sampling
        self._forbidden = np.zeros(0, np.intp) if forbidden is None else np.sort(forbidden)
        self._never = frozenset(self._forbidden.tolist())
        self._ids = list(prompt)
        self._seen = set(self._ids) - self._never
        self._counts: dict[int, int] = {}
        self._processor = processor
        bias = sampling.logit_bias
        self._biased = np.fromiter(bias.keys(), np.intp, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
        penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1
        self._changes = any(penalties) or len(bias) > 0 or processor is not None
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """The next id, from (vocab,) logits, which stay as they are; it counts as generated from now on.

        Raises FormatError if the logits hold NaN or infinity, as damaged weights make them; OptionError if bias
        or processor leave no token to draw; whatever the processor raises.
        """
        id = self._choose(self._adjusted(logits))
        self.add(id)
        return id

    def add(self, id: int) -> None:
        """Count `id`, which was not drawn here, as generated."""
        self._ids.append(id)
        if id not in self._never:  # else there may be no logit to penalize
            self._seen.add(id)
            self._counts[id] = self._counts.get(id, 0) + 1

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        forbidden = self._forbidden
        # Rows without a token are the embedding's last: then they are cut off, not overwritten in a copy.
        if self._processor is None and len(forbidden) and forbidden[0] == len(logits) - len(forbidden):
            logits, forbidden = logits[: forbidden[0]], forbidden[:0]
        if not self._changes and not len(forbidden):
            return logits
        s, (ids, biases) = self.sampling, self._biased
        generated = self._counts if s.presence_penalty or s.frequency_penalty else {}
        seen = self._seen if s.repetition_penalty != 1 else ()
        logits = logits.copy()
        if len(ids):
            real = ids < len(logits)
            logits[ids[real]] += biases[real]
        if seen:
            rows = np.fromiter(seen, np.intp, len(seen))
            x = logits[rows]
            logits[rows] = np.where(x < 0, x * s.repetition_penalty, x / s.repetition_penalty)
        if generated:
            rows = np.fromiter(generated.keys(), np.intp, len(generated))
            times = np.fromiter(generated.values(), np.float32, len(generated))
            logits[rows] -= s.presence_penalty + s.frequency_penalty * times
        if self._processor is not None:
            logits = self._processed(logits, self._processor)
        logits[forbidden] = -np.inf
        return logits

    def _processed(self, logits: NDArray[np.float32], processor: LogitsProcessor) -> NDArray[np.float32]:
        given = processor(self._ids.copy(), logits)
        if given is None:
            return logits
        try:
            replaced = np.array(given, np.float32)
        except (TypeError, ValueError):
            raise OptionError(f"logits_processor returned {type(given).__name__}, not an array of logits") from None
        if replaced.shape != logits.shape:
            raise OptionError(f"logits_processor returned shape {replaced.shape}, not {logits.shape}")
        return replaced

    def _choose(self, logits: NDArray[np.float32]) -> int:
        s = self.sampling
        if s.temperature == 0 or s.top_k == 1:
            best = int(logits.argmax())  # NaN counts as the greatest
            self._check(float(logits[best]))
            return best
        if s.top_k:
            return self._draw(greatest(logits, s.top_k), logits)
        p = self._weights(logits)
        if s.top_p < 1:
            total = float(p.sum())
            return self._draw(_at_least(p, s.top_p * total, logits), logits, total)
        if s.min_p:
            p[p < s.min_p] = 0
        mass = np.cumsum(p)
        # random() < 1, so this never runs past the end, and never hits a token of no mass.
        return int(np.searchsorted(mass, self._random.random() * mass[-1], side="right"))

    def _draw(self, ids: NDArray[np.intp], logits: NDArray[np.float32], total: float | None = None) -> int:
        """One of these ids, by top-p and min-p; total: what all weights sum to, if these ids are not all."""
        some = logits[ids]
        top = self._check(float(some.max()))
        if len(ids) > MANY:  # such as all that a processor forbids, which tie for the last place
            likely = some >= np.float32(top) - np.float32(_NO_WEIGHT * self.sampling.temperature)
            ids, some = ids[likely], some[likely]
        draw = self._draw_few if len(ids) <= MANY else self._draw_many
        return draw(ids, some, top, total)

    def _draw_few(self, ids: NDArray[np.intp], some: NDArray[np.float32], top: float, total: float | None) -> int:
        """some: the ids' logits. Plain numbers: so few that calling NumPy takes longer than computing."""
        s = self.sampling
        weights = [math.exp((logit - top) / s.temperature) for logit in some.tolist()]
        pairs: list[tuple[float, int]] = sorted(zip(weights, ids.tolist(), strict=True), key=lambda pair: -pair[0])
        if s.top_p < 1:
            wanted, before = s.top_p * (math.fsum(weights) if total is None else total), 0.0
            for n, (weight, _) in enumerate(pairs, 1):
                before += weight
                if before >= wanted:
                    pairs = pairs[:n]
                    break
        pairs = [pair for pair in pairs if pair[0] >= s.min_p]
        left = self._random.random() * math.fsum(weight for weight, _ in pairs)
        for weight, id in pairs:
            left -= weight
            if left < 0:
                return id
        return pairs[0][1]  # rounding left nothing of the last one

    def _draw_many(self, ids: NDArray[np.intp], some: NDArray[np.float32], top: float, total: float | None) -> int:
        """`_draw_few` with arrays."""
        s = self.sampling
        order = np.argsort(-some, kind="stable")
        weights = np.exp((some[order].astype(np.float64) - top) / s.temperature)
        mass = np.cumsum(weights)
        if s.top_p < 1:
            wanted = s.top_p * (mass[-1] if total is None else total)
            mass = mass[: np.searchsorted(mass, wanted) + 1]
        mass = mass[: np.count_nonzero(weights >= s.min_p)]
        return int(ids[order[np.searchsorted(mass, self._random.random() * mass[-1], side="right")]])

    def _check(self, top: float) -> float:
        """The greatest logit, if it is finite as it must be."""
        if math.isfinite(top):
            return top
        if self._processor is not None or (top == -math.inf and self.sampling.logit_bias):
            raise OptionError(f"the greatest logit that logit_bias and logits_processor leave is {top}")
        raise FormatError(f"the model computed a logit of {top}: damaged weights; convert it again")

    def _weights(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities up to a common factor; the likeliest token's is 1."""
        top = self._check(float(logits.max()))
        with np.errstate(over="ignore"):  # a tiny temperature: exp(-inf) is the 0 that is meant
            return np.exp((logits.astype(np.float64) - top) / self.sampling.temperature)


def greatest(values: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """The indices, ascending, of the k greatest values, and of those equal to the k-th; NaN counts as greatest."""
    if k >= len(values):
        return np.arange(len(values))
    if k > MANY:
        kth = np.partition(values, len(values) - k)[len(values) - k]
        return np.flatnonzero(~(values < kth))
    ids = np.empty(len(values), np.int64)
    args = values, np.empty(k, np.float32), np.empty(len(values) // BLOCK, np.float32), ids
    if not select.overloads:
        compile_kernel(select, args)
    return ids[: select(*args)]


def _at_least(p: NDArray[np.float64], mass: float, logits: NDArray[np.float32]) -> NDArray[np.intp]:
    """Indices, ascending, of the greatest of `p`, enough to hold `mass`: so that not all need sorting.

    logits: what p was made of; of very small p, only they can still be told apart in float32.
    """
    k = 256
    while k < len(p):
        ids = greatest(logits, k)
        if p[ids].sum() >= mass:
            return ids
        k *= 8
    return np.arange(len(p))
