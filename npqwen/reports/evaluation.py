"""How well a model predicts texts, and how far its predictions are from another model's.

A text is run in windows, each from an empty context. Every token that a window adds to the previous windows is
predicted once; a text's first token, and without overlap every window's first, has no context and is not counted. All
logarithms are natural. Standard errors are those of a mean over tokens, which are taken as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.checks import check_ids, check_whole
from npqwen.engine.engine import Engine
from npqwen.engine.substitution import Part, parts, substituted
from npqwen.errors import CheckpointError, OptionError
from npqwen.reports.evaluation_report import Evaluation, Greedy, LayerCosts, PartCost, Score, Values, estimate
from npqwen.wording import shortened

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache
    from npqwen.generation.language_model import LanguageModel

    Texts = str | Sequence[str] | Mapping[str, str | Sequence[int]]

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Progress = Callable[[int, int], None]

WINDOW = 512
"""Default number of tokens in a window."""
GREEDY_TOKENS = 16
"""Tokens of a greedy continuation."""
PROMPT_TOKENS = 64
"""Most tokens in a prompt for greedy continuations."""
LAYER_TOKENS = 4096
"""Most tokens on which the cost of each layer is measured."""
LAYER_WINDOW = 256
"""Most tokens in a window for the cost of layers: the base's logits of a whole window are kept in memory."""
_LOGITS_BYTES = 1 << 26
"""Most bytes of logits that one pass computes."""
_PASS_TOKENS = 256
_COMPARED = 1 << 18
"""Logits that are compared at a time: they stay in the processor's cache."""


@dataclass(frozen=True)
class Window:
    """Tokens start to end - 1 of a text, run from an empty context; those from `first` are counted."""

    start: int
    first: int
    end: int


def windows(tokens: int, window: int, stride: int) -> Iterator[Window]:
    """The windows of a text; the last may be shorter.

    They begin `stride` tokens apart. A window counts the tokens after the end of the previous window.
    """
    counted = 1
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        first = max(counted, start + 1)
        if first < end:
            yield Window(start, first, end)
        counted = end
        if end == tokens:
            return


def evaluate(
    model: LanguageModel,
    texts: Texts,
    against: LanguageModel | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    prompts: int = 32,
    layers: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the perplexity of texts, and how far the model's predictions are from those of `against`.

    texts: a text, several, or a mapping from names to texts or to their token ids. Special tokens that are spelled out
    in a text are encoded as special tokens.
    against: the base, usually the unquantized model. Adds to the result KL(base || model), the top-1 agreement, and
    greedy continuations: from the first (at most 64) tokens of `prompts` windows, the base's next 16 tokens are
    compared with the model's most likely token after the same prefix. prompts=0: none.
    window: tokens of a window, 2 or more; default: 512, at most the model's context.
    stride: tokens from one window's start to the next one's, default: `window`. With a smaller one windows overlap, so
    every token but a text's first few has at least window - stride tokens of context.
    layers: also measure the cost of each part of the model, on at most 4,096 tokens in windows of at most 256: the KL
    divergence of the base with only that part replaced by the model's. Needs two models of the same dimensions.
    progress(done, total): called with numbers of tokens.

    Raises OptionError for impossible options, for a text of fewer than 2 tokens, and for two models of different
    tokenizers.
    """
    encoded = {name: _encode(model, name, text) for name, text in _named(texts).items()}
    if against is not None:
        _check_comparable(model, against, encoded, texts)
    elif layers:
        raise OptionError("layers compares two models; give the unquantized one as against")
    context = model.context if against is None else min(model.context, against.context)
    window = min(WINDOW, context) if window is None else check_whole("window", window, 2, context)
    stride = window if stride is None else check_whole("stride", stride, 1, window)
    cut = {name: _cut(ids, window, stride) for name, ids in encoded.items()}
    chosen = [ids for pieces in cut.values() for ids, _ in pieces]
    heads = _prompts(chosen, check_whole("prompts", prompts), context) if against is not None else []
    engines = _engines(against, model) if layers else None
    replaced = parts(*engines) if engines else []
    short = _short_windows(chosen) if engines else []
    work = _Work(
        progress,
        sum(ids.size for ids in chosen) * (1 if against is None else 2)
        + 2 * sum(ids.size + GREEDY_TOKENS for ids in heads)
        + sum(ids.size for ids in short) * (len(replaced) + 2),
    )
    runner = _Runner(model, window, work)
    base = None if against is None else _Runner(against, window, work)
    found = {
        name: Values.concatenate([_measure(runner, base, ids, first) for ids, first in pieces])
        for name, pieces in cut.items()
    }
    values = Values.concatenate(list(found.values()))
    if not np.isfinite(values.nll if values.kl is None else values.nll + values.kl).all():
        raise CheckpointError(f"{model.path} computes logits that are not finite; is its checkpoint broken?")
    return Evaluation(
        model=str(model.path),
        encoding=_encoding(model),
        against=None if against is None else str(against.path),
        against_encoding=None if against is None else _encoding(against),
        window=window,
        stride=stride,
        total=Score.of(values),
        texts={name: Score.of(part) for name, part in found.items()},
        greedy=_greedy(model, against, heads, work) if against is not None and heads else None,
        layers=_layer_costs(*engines, replaced, short, work) if engines else None,
        values=values,
    )


def compare(logits: Logits, targets: Ids, base: Logits | None = None) -> Values:
    """Compare logits (tokens, vocab_size) with the tokens (tokens,) that follow in the text, and with base's logits.

    Sums are in float64. The difference of the logits is averaged, not that of log-probabilities, so that rounding
    them to float32 does not add to a small divergence.
    """
    step = max(1, _COMPARED // logits.shape[1])
    blocks = [slice(at, at + step) for at in range(0, len(logits), step)]
    return Values.concatenate(
        [_compare(logits[rows], targets[rows], None if base is None else base[rows]) for rows in blocks]
    )


def _compare(logits: Logits, targets: Ids, base: Logits | None) -> Values:
    rows = np.arange(len(logits))
    _, normalizer = _softmax(logits)
    nll = normalizer - logits[rows, targets]
    if base is None:
        return Values(nll)
    weights, base_normalizer = _softmax(base)
    total = weights.sum(1, dtype=np.float64)
    weights *= base - logits
    difference = weights.sum(1, dtype=np.float64) / total
    return Values(
        nll,
        base_normalizer - base[rows, targets],
        np.maximum(difference - base_normalizer + normalizer, 0.0),  # negative only by rounding
        base.argmax(1) == logits.argmax(1),
    )


def _softmax(logits: Logits) -> tuple[Logits, NDArray[np.float64]]:
    """exp(logits - their maximum), and the logarithm of the sum of exp(logits), of each row."""
    largest = logits.max(1, keepdims=True)
    weights: Logits = np.exp(logits - largest)
    return weights, np.asarray(largest[:, 0] + np.log(weights.sum(1, dtype=np.float64)), np.float64)


class _Work:
    """Counts tokens that have been run."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, tokens: int) -> None:
        self.done += tokens
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Runner:
    """Runs a model over windows, a few tokens at a time, in the same buffers."""

    def __init__(
        self, model: LanguageModel | Engine, window: int, work: _Work, cache: KVCache | None = None
    ) -> None:
        self.model, self.work = model, work
        self.cache = model.new_cache(window) if cache is None else cache
        vocabulary = model.config.vocab_size
        rows = min(_PASS_TOKENS, window, max(16, _LOGITS_BYTES // (4 * vocabulary) // 16 * 16))
        self._out = np.empty((rows, vocabulary), np.float32)

    def logits(self, ids: Ids, first: int) -> Iterator[tuple[slice, Logits]]:
        """The logits that predict ids[first:], some tokens at a time: a slice of ids, and a row for each of its tokens.

        The rows are valid until the next ones are computed.
        """
        self.cache.truncate(0)
        if first > 1:
            self.model.forward(ids[: first - 1], self.cache)
            self.work.add(first - 1)
        for at in range(first - 1, ids.size - 1, len(self._out)):
            end = min(at + len(self._out), ids.size - 1)
            yield slice(at + 1, end + 1), self.model.forward(
                ids[at:end], self.cache, all_logits=True, out=self._out[: end - at]
            )
            self.work.add(end - at + (end == ids.size - 1))


def _measure(model: _Runner, base: _Runner | None, ids: Ids, first: int) -> Values:
    """One window's values."""
    if base is None:
        return Values.concatenate([compare(logits, ids[at]) for at, logits in model.logits(ids, first)])
    both = zip(model.logits(ids, first), base.logits(ids, first), strict=True)
    return Values.concatenate([compare(logits, ids[at], other) for (at, logits), (_, other) in both])


def _named(texts: Texts) -> Mapping[str, str | Sequence[int]]:
    if isinstance(texts, str):
        return {"text": texts}
    if isinstance(texts, Mapping):
        named: Mapping[str, str | Sequence[int]] = texts
    elif isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts):
        named = {f"text {i}": text for i, text in enumerate(texts, 1)}
    else:
        raise OptionError("texts must be a text, a list of texts, or a dictionary from names to texts or token ids")
    if not named:
        raise OptionError("there is no text to evaluate; give at least one")
    return named


def _encode(model: LanguageModel, name: str, text: str | Sequence[int]) -> Ids:
    ids = model.tokenizer.encode(text) if isinstance(text, str) else check_ids(name, text)
    if len(ids) < 2:
        raise OptionError(f"{shortened(name, 200)} is too short; a text must have at least 2 tokens")
    return np.array(ids, np.int64)


def _cut(ids: Ids, window: int, stride: int) -> list[tuple[Ids, int]]:
    """A text's windows, and the index in each of the first token that is counted."""
    return [(ids[w.start : w.end], w.first - w.start) for w in windows(ids.size, window, stride)]


def _check_comparable(model: LanguageModel, base: LanguageModel, encoded: Mapping[str, Ids], texts: Texts) -> None:
    """Refuse two models whose distributions are not over the same tokens."""
    sizes = model.config.vocab_size, base.config.vocab_size
    if sizes[0] != sizes[1]:
        raise OptionError(
            f"{model.path} has {sizes[0]} logits and {base.path} {sizes[1]}; "
            "only models of the same vocabulary can be compared"
        )
    same = model.tokenizer.vocabulary == base.tokenizer.vocabulary
    for name, text in _named(texts).items() if same else ():
        same = same and (not isinstance(text, str) or base.tokenizer.encode(text) == encoded[name].tolist())
    if not same:
        raise OptionError(
            f"the tokenizers of {model.path} and {base.path} differ; only models of the same tokenizer can be compared"
        )


def _encoding(model: LanguageModel) -> str:
    """The name of a converted model's recipe."""
    return model.weights.quantization.recipe.name if isinstance(model, Engine) else ""


def _spaced(items: list[Ids], count: int) -> list[Ids]:
    """`count` of the items, or all, evenly spaced."""
    if count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]


# --- greedy continuations ---


def _prompts(chosen: list[Ids], count: int, context: int) -> list[Ids]:
    """The beginnings of evenly spaced windows: half of each, at most 64 tokens."""
    longest = min(PROMPT_TOKENS, context - GREEDY_TOKENS)
    return [ids[: min(longest, ids.size // 2)] for ids in _spaced(chosen, count)] if longest > 0 else []


def _greedy(model: LanguageModel, base: LanguageModel, prompts: list[Ids], work: _Work) -> Greedy:
    """Compare the greedy choices of both after prefixes that the base generated."""
    agreement = np.zeros((len(prompts), GREEDY_TOKENS), np.bool_)
    for ids, agrees in zip(prompts, agreement, strict=True):
        cache = base.new_cache(ids.size + GREEDY_TOKENS)
        tokens = [int(base.prefill(ids, cache).argmax())]
        while len(tokens) < GREEDY_TOKENS:
            tokens.append(int(base.forward(tokens[-1:], cache)[0].argmax()))
        work.add(ids.size + GREEDY_TOKENS)
        cache = model.new_cache(ids.size + GREEDY_TOKENS)
        first = int(model.prefill(ids, cache).argmax())
        rest = model.forward(tokens[:-1], cache, all_logits=True).argmax(1)
        work.add(ids.size + GREEDY_TOKENS)
        agrees[:] = np.array([first, *rest]) == tokens
    return Greedy(
        prompts=len(prompts),
        tokens=GREEDY_TOKENS,
        agreement=estimate(agreement.mean(1)),
        equal=int(agreement.all(1).sum()),
    )


# --- the cost of each part ---


def _engines(base: object, model: object) -> tuple[Engine, Engine]:
    if not isinstance(base, Engine) or not isinstance(model, Engine):
        raise OptionError("layers needs two converted models")
    return base, model


def _short_windows(chosen: list[Ids]) -> list[Ids]:
    """Evenly spaced windows of at most 4,096 tokens in total."""
    longest = min(LAYER_WINDOW, max(ids.size for ids in chosen))
    return [ids[:longest] for ids in _spaced(chosen, LAYER_TOKENS // longest)]


def _layer_costs(base: Engine, model: Engine, replaced: Sequence[Part], chosen: list[Ids], work: _Work) -> LayerCosts:
    """KL divergences from the base of variants of it, each with one part replaced by the model's."""
    window = max(ids.size for ids in chosen)
    first = _Runner(base, window, work)
    # They share one cache: each empties it before a window.
    runners = [_Runner(substituted(base, model, part), window, work, first.cache) for part in replaced]
    runners.append(_Runner(model, window, work))
    found: list[list[NDArray[np.float64]]] = [[] for _ in runners]
    for ids in chosen:
        expected = np.concatenate([logits.copy() for _, logits in first.logits(ids, 1)])
        for runner, values in zip(runners, found, strict=True):
            for at, logits in runner.logits(ids, 1):
                kl = compare(logits, ids[at], expected[at.start - 1 : at.stop - 1]).kl
                assert kl is not None
                values.append(kl)
    costs = [estimate(np.concatenate(values)) for values in found]
    return LayerCosts(
        tokens=sum(ids.size - 1 for ids in chosen),
        parts=[PartCost(part.name, cost) for part, cost in zip(replaced, costs[:-1], strict=True)],
        whole=costs[-1],
    )
