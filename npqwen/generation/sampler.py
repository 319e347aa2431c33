"""From logits to the next token: bias, penalties, temperature, top-k, top-p, min-p, and the draw.

The order is that of Hugging Face transformers: bias, repetition penalty, presence and frequency penalty, the
caller's logits_processor, temperature, top-k, top-p, min-p, each applied to the result of the previous one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import FormatError, OptionError
from npqwen.generation.options import LogitsProcessor
from npqwen.generation.sampling import Sampling
from npqwen.kernels.bit_mask import mask
from npqwen.kernels.compiled import compile_kernel
from npqwen.kernels.draw import draw
from npqwen.kernels.greatest import MAXIMA_BLOCK, all_maxima, select

MANY = 500
"""Up to this many candidates are selected and drawn from by compiled kernels; more, with NumPy."""
_NO_WEIGHT = 750.0
"""exp(-746) is 0 in float64: a logit that is more than 750 temperatures below the maximum is never drawn."""


class Sampler:
    """Draws the tokens of one text.

    prompt: the ids before the text, for the repetition penalty and for `processor`.
    forbidden: ids that are never drawn, such as embedding rows without a token.
    processor: changes the logits after bias and penalties, before the temperature; see `LogitsProcessor`.
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
        self._masked: NDArray[np.float32] | None = None

    def __call__(
        self,
        logits: NDArray[np.float32],
        allowed: NDArray[np.uint32] | None = None,
        maxima: NDArray[np.float32] | None = None,
    ) -> int:
        """Draw the next id from logits, float32 (vocab_size,), which are not changed, and count it as generated.

        maxima: the block maxima of the logits, see `npqwen.kernels.greatest.block_maxima`, if they are known. allowed:
        draw only tokens whose bit is set: token i is bit i % 32 of word i // 32. It applies after bias, penalties and
        processor. If only one token is allowed, no random number is used.

        Raises FormatError for NaN or infinite logits, a sign of damaged weights, OptionError if bias, processor and
        `allowed` leave no token to draw, and what the processor raises.
        """
        adjusted = self._adjusted(logits)
        if allowed is not None:
            id = self._choose_allowed(adjusted, allowed)
        else:
            # `maxima` are those of the raw logits, before bias, penalties and processor.
            id = self._choose(adjusted, maxima=maxima if np.may_share_memory(adjusted, logits) else None)
        self.add(id)
        return id

    def may_force(self, id: int) -> bool:
        """Whether `id` would be drawn if it were the only token allowed, and no processor has to see it first."""
        return self._processor is None and self.sampling.logit_bias.get(id) != -math.inf and id not in self._never

    def add(self, id: int) -> None:
        """Count `id` as generated. For forced tokens only: drawn ones are counted already."""
        self._ids.append(id)
        if id not in self._never:  # a forbidden id may have no logit to penalize
            self._seen.add(id)
            self._counts[id] = self._counts.get(id, 0) + 1

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits after bias, penalties and processor: a copy, or a view of the logits of existing tokens."""
        forbidden = self._forbidden
        # Embedding rows without a token are usually the last ones: slicing them off avoids a copy.
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
        """The logits after the caller's processor; OptionError if it returns anything but an array of their shape."""
        result = processor(self._ids.copy(), logits)
        if result is None:
            return logits
        try:
            processed = np.array(result, np.float32)
        except (TypeError, ValueError):
            raise OptionError(f"logits_processor returned {type(result).__name__}, not an array of logits") from None
        if processed.shape != logits.shape:
            raise OptionError(f"logits_processor returned shape {processed.shape}, not {logits.shape}")
        return processed

    def _choose_allowed(self, logits: NDArray[np.float32], allowed: NDArray[np.uint32]) -> int:
        """Draw one of the allowed ids from adjusted logits."""
        if self._masked is None or len(self._masked) != len(logits):
            self._masked = np.empty_like(logits)
            if not mask.overloads:
                compile_kernel(mask, (logits, allowed, self._masked))
        count = mask(logits, allowed, self._masked)
        best = int(self._masked.argmax())
        if not count or self._masked[best] == -math.inf:
            problem = "logit_bias and logits_processor forbid all tokens" if count else "the vocabulary has no token"
            raise OptionError(f"no token can be drawn: {problem} that the text's structure allows next")
        if count == 1:
            self._check(float(self._masked[best]))
            return best
        return self._choose(self._masked, count)

    def _choose(
        self, logits: NDArray[np.float32], count: int | None = None, maxima: NDArray[np.float32] | None = None
    ) -> int:
        """Draw an id from adjusted logits, or take the likeliest if sampling is greedy.

        count: how many ids are allowed, if not all; the other logits are minus infinity. maxima: the block maxima.
        """
        s = self.sampling
        if s.temperature == 0 or s.top_k == 1:
            best = likeliest(logits, maxima)
            self._check(float(logits[best]))
            return best
        k = s.top_k
        if count is not None and (k or count <= MANY):
            k = min(k or count, count)
        if k:
            return self._draw(greatest(logits, k, maxima), logits)
        p = self._weights(logits)
        if s.top_p < 1:
            total = float(p.sum())
            return self._draw(_nucleus(p, s.top_p * total, logits), logits, total)
        if s.min_p:
            p[p < s.min_p] = 0
        mass = np.cumsum(p)
        # random() < 1, so the index is below len(p), and never that of a token without mass.
        return int(np.searchsorted(mass, self._random.random() * mass[-1], side="right"))

    def _draw(self, ids: NDArray[np.intp], logits: NDArray[np.float32], total: float | None = None) -> int:
        """Draw one of the candidates `ids`, after top-p and min-p.

        total: the sum of the weights exp((logit - maximum) / temperature) of all tokens, if `ids` are not all of them.
        """
        s = self.sampling
        if len(ids) > MANY:  # for example, all tokens that a processor forbids tie with the k-th
            candidates = logits[ids]
            top = self._check(float(candidates.max()))
            likely = candidates >= np.float32(top) - np.float32(_NO_WEIGHT * s.temperature)
            ids, candidates = ids[likely], candidates[likely]
            if len(ids) > MANY:
                return self._draw_many(ids, candidates, top, total)
        options = float(s.temperature), float(s.top_p), float(s.min_p)
        args = logits, ids, np.empty(len(ids)), *options, -1.0 if total is None else total, self._random.random()
        if not draw.overloads:
            compile_kernel(draw, args)
        id: int = draw(*args)
        if id < 0:
            self._check(float(logits[ids].max()))
        return id

    def _draw_many(self, ids: NDArray[np.intp], logits: NDArray[np.float32], top: float, total: float | None) -> int:
        """`_draw` for many candidates, with NumPy. logits: the candidates'. top: their maximum."""
        s = self.sampling
        order = np.argsort(-logits, kind="stable")
        weights = np.exp((logits[order].astype(np.float64) - top) / s.temperature)
        mass = np.cumsum(weights)
        if s.top_p < 1:
            needed = s.top_p * (mass[-1] if total is None else total)
            mass = mass[: np.searchsorted(mass, needed) + 1]
        mass = mass[: np.count_nonzero(weights >= s.min_p)]
        return int(ids[order[np.searchsorted(mass, self._random.random() * mass[-1], side="right")]])

    def _check(self, top: float) -> float:
        """`top`, the maximum of the logits, if it is finite.

        Raises OptionError if bias or processor may be the cause, else FormatError.
        """
        if math.isfinite(top):
            return top
        if self._processor is not None or (top == -math.inf and self.sampling.logit_bias):
            raise OptionError(f"logit_bias and logits_processor leave a greatest logit of {top}: no token can be drawn")
        raise FormatError(f"the model computed a logit of {top}, a sign of damaged weights; convert it again")

    def _weights(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Each token's exp((logit - maximum) / temperature): its probability relative to the likeliest token's."""
        top = self._check(float(logits.max()))
        with np.errstate(over="ignore"):  # with a tiny temperature the quotient overflows to -inf, and exp is 0
            return np.exp((logits.astype(np.float64) - top) / self.sampling.temperature)


def likeliest(logits: NDArray[np.float32], maxima: NDArray[np.float32] | None = None) -> int:
    """The first index of the greatest of the logits; NaN counts as the greatest.

    maxima: see `npqwen.kernels.greatest.block_maxima`; without them, all logits are read.
    """
    blocks = len(logits) // MAXIMA_BLOCK
    if maxima is None or not blocks:
        return int(logits.argmax())
    at = MAXIMA_BLOCK * int(maxima[:blocks].argmax())
    best = at + int(logits[at : at + MAXIMA_BLOCK].argmax())
    rest = logits[MAXIMA_BLOCK * blocks :]
    if not len(rest):
        return best
    last = MAXIMA_BLOCK * blocks + int(rest.argmax())
    return (best, last)[logits[[best, last]].argmax()]


def greatest(values: NDArray[np.float32], k: int, maxima: NDArray[np.float32] | None = None) -> NDArray[np.intp]:
    """The indices, ascending, of the k greatest values and of all equal to the k-th; NaN counts as the greatest.

    maxima: see `npqwen.kernels.greatest.block_maxima`; without them, all values are read.
    """
    if k >= len(values):
        return np.arange(len(values), dtype=np.intp)
    if k > MANY:
        kth = np.partition(values, len(values) - k)[len(values) - k]
        return np.flatnonzero(~(values < kth))
    ids = np.empty(len(values), np.int64)
    blocks = len(values) // MAXIMA_BLOCK
    if maxima is None:
        maxima = np.empty(blocks, np.float32)
        if not all_maxima.overloads:
            compile_kernel(all_maxima, (values, maxima))
        all_maxima(values, maxima)
    args = values, maxima[:blocks], np.empty(k, np.float32), ids
    if not select.overloads:
        compile_kernel(select, args)
    return ids[: select(*args)]


def _nucleus(p: NDArray[np.float64], mass: float, logits: NDArray[np.float32]) -> NDArray[np.intp]:
    """Indices, ascending, of enough of the greatest `p` to sum to `mass`, without sorting all of them.

    logits: what p was computed from; they order the tokens even where p underflows.
    """
    k = 256
    while k < len(p):
        ids = greatest(logits, k)
        if p[ids].sum() >= mass:
            return ids
        k *= 8
    return np.arange(len(p), dtype=np.intp)
