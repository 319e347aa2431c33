"""Sampling, against a twin that sorts the whole vocabulary as the definitions say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from maxima import write_maxima
from numpy.typing import NDArray

from npqwen.errors import FormatError, OptionError
from npqwen.generation import sampler
from npqwen.generation.options import LogitsProcessor
from npqwen.generation.sampler import MANY, Sampler, greatest, likeliest
from npqwen.generation.sampling import Sampling
from npqwen.kernels.draw import draw
from npqwen.kernels.greatest import MAXIMA_BLOCK


def distribution(
    logits: np.ndarray, s: Sampling, prompt: list[int], generated: list[int], forbidden: list[int]
) -> NDArray[np.float64]:
    """The probability of every id, float64, step by step on whole arrays."""
    x: NDArray[np.float64] = logits.astype(np.float64)
    for id, bias in s.logit_bias.items():
        x[id] += bias
    for id in set(prompt) | set(generated):
        x[id] = x[id] * s.repetition_penalty if x[id] < 0 else x[id] / s.repetition_penalty
    for id in set(generated):
        x[id] -= s.presence_penalty + s.frequency_penalty * generated.count(id)
    x[forbidden] = -np.inf

    def softmax() -> NDArray[np.float64]:
        e = np.exp(x - x.max())
        p: NDArray[np.float64] = e / e.sum()
        return p

    if s.temperature == 0:
        certain: NDArray[np.float64] = np.eye(len(x))[x.argmax()]
        return certain
    x /= s.temperature
    if s.top_k:
        x[x < np.sort(x)[-min(s.top_k, len(x))]] = -np.inf
    p = softmax()
    order = np.argsort(-p, kind="stable")
    above = np.cumsum(p[order]) - p[order]  # the mass of likelier tokens
    if s.top_p < 1:
        x[order[above >= s.top_p]] = -np.inf
    p = softmax()
    x[p < s.min_p * p.max()] = -np.inf
    return softmax()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 1.5, "repetition_penalty": 1.7, "presence_penalty": 1.5},
    {"temperature": 1.5, "repetition_penalty": 0.5, "presence_penalty": -1.0, "top_k": 5},
    {"temperature": 1.5, "frequency_penalty": 0.7, "presence_penalty": 0.5},
    {"temperature": 1.5, "logit_bias": {0: 3.5, 7: -np.inf, 11: -1, 12: 2}, "repetition_penalty": 1.3, "top_p": 0.9},
]


@pytest.mark.parametrize("few", [0, MANY])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_have_the_twins_distribution(options: dict[str, Any], few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates are drawn from in plain Python, many with NumPy."""
    monkeypatch.setattr("npqwen.generation.sampler.MANY", few)
    logits = np.random.default_rng(0).normal(0, 2, 60).astype(np.float32)
    best = np.argsort(-logits)
    prompt, forbidden = best[:6:2].tolist(), best[[1, 9]].tolist()
    generated = [*best[2:8:2].tolist(), int(best[4]), int(best[4]), int(best[2])]
    sampling = Sampling(**options, seed=3)
    expected = distribution(logits, sampling, prompt, generated, forbidden)
    draws = 4000
    draw = Sampler(sampling, prompt, np.array(forbidden))
    counts = np.zeros(60)
    for _ in range(draws):
        draw._seen, draw._counts = {*prompt, *generated}, Counter(generated)  # each draw is the next one
        counts[draw(logits)] += 1
    assert not counts[expected == 0].any()
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert np.all(np.abs(counts - draws * expected) < 5 * deviation + 1)


@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_only_the_twins_ids_are_drawn_from_a_large_vocabulary(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, 151_936).astype(np.float32)
    forbidden = np.arange(151_669, 151_936)
    logits[forbidden[0]] = 100
    sampling = Sampling(**options, seed=4)
    expected = distribution(logits, sampling, [], [], forbidden.tolist())
    for seed in range(20):
        id = Sampler(Sampling(**options, seed=seed), (), forbidden)(logits)
        assert expected[id] > 0


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ids each draw weighed one by one, or sorted."""
    counts: list[int] = []

    def few(logits: np.ndarray, ids: np.ndarray, *args: Any) -> Any:
        counts.append(len(ids))
        return draw(logits, ids, *args)

    def many(self: Sampler, ids: np.ndarray, *args: Any) -> Any:
        counts.append(len(ids))
        return draw_many(self, ids, *args)

    draw_many = Sampler._draw_many
    monkeypatch.setattr(Sampler, "_draw_many", many)
    monkeypatch.setattr(sampler, "draw", few)
    few.overloads = draw.overloads  # type: ignore[attr-defined]
    return counts


@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.9}, {"temperature": 0.1, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("low", [-np.inf, -1e9])
def test_ids_that_a_processor_forbids_cost_nothing(options: dict[str, Any], low: float, weighed: list[int]) -> None:
    """They tie for the last of the likeliest places: all of the vocabulary would be sorted at every token."""
    allowed = np.arange(1000, 101_000, 10_000)

    def processor(ids: list[int], logits: np.ndarray) -> np.ndarray:
        only = np.full_like(logits, low)
        only[allowed] = logits[allowed]
        return only

    logits = np.random.default_rng(2).normal(0, 3, 151_936).astype(np.float32)
    draw = Sampler(Sampling(**options, seed=1), (), None, processor)
    assert all(draw(logits) in allowed for _ in range(20))
    assert weighed == [10] * 20


def test_a_low_temperature_sorts_no_more_than_a_high_one(weighed: list[int]) -> None:
    """All probabilities but one are 0 in float32, where they tie, and are still not the same."""
    logits = np.random.default_rng(2).normal(0, 3, 151_936).astype(np.float32)
    logits[7] = 30.0
    draw = Sampler(Sampling(temperature=0.1, top_p=0.9, seed=1))
    assert [draw(logits) for _ in range(20)] == [7] * 20
    assert max(weighed) <= 256


def test_forbidden_ids_in_the_text_are_not_penalized() -> None:
    """Rows without a token are cut off: such an id has no logit there."""
    draw = Sampler(Sampling(temperature=0, presence_penalty=1.0, repetition_penalty=1.1), [4], np.array([3, 4]))
    for id in (3, 4):
        draw.add(id)
    assert draw(np.array([1.0, 3.0, 2.0, 9.0, 9.0], np.float32)) == 1


@pytest.mark.parametrize("n", [1, 63, 64, 5000, 64 * 500 + 17])
@pytest.mark.parametrize("k", [1, 2, 20, 100])
def test_the_greatest_values_with_ties(n: int, k: int) -> None:
    rng = np.random.default_rng(n + k)
    for values in (
        rng.normal(size=n),
        rng.integers(0, 5, n).astype(float),  # ties
        np.zeros(n),
        np.arange(n) - n / 2,
        np.where(rng.random(n) < 0.99, -np.inf, 1.0),
    ):
        kth = np.sort(values)[-min(k, n)]
        logits = values.astype(np.float32)
        for maxima in (None, maxima_of(logits)):
            assert greatest(logits, k, maxima).tolist() == np.flatnonzero(values >= kth).tolist()
            assert likeliest(logits, maxima) == logits.argmax()


def maxima_of(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of blocks, in an array with room for more."""
    maxima = np.full((1, len(logits) // MAXIMA_BLOCK + 3), np.nan, np.float32)
    write_maxima([logits.reshape(1, -1)], maxima)
    found: NDArray[np.float32] = maxima[0]
    return found


@pytest.mark.parametrize("at", [0, 100, 64 * 4 + 1])
def test_nan_is_the_likeliest_whatever_is_known_of_blocks(at: int) -> None:
    logits = np.zeros(64 * 4 + 2, np.float32)
    logits[at] = np.nan
    assert likeliest(logits, maxima_of(logits)) == at
    with pytest.raises(FormatError, match="a logit of nan"):
        Sampler(Sampling(temperature=0))(logits, maxima=maxima_of(logits))
    with pytest.raises(FormatError, match="a logit of nan"):
        Sampler(Sampling(top_k=5))(logits, maxima=maxima_of(logits))


@pytest.mark.parametrize(
    ("sampling", "forbidden", "processor"),
    [
        (Sampling(top_k=20, seed=1), [], None),
        (Sampling(top_k=20, seed=1), range(400, 500), None),
        (Sampling(top_k=3, seed=1), [7, 8, 300], None),
        (Sampling(temperature=0), [7, 8, 300], None),
        (Sampling(top_k=5, seed=1, presence_penalty=2, repetition_penalty=1.3), [], None),
        (Sampling(top_k=5, seed=1, logit_bias={3: 9.0}), range(400, 500), None),
        (Sampling(temperature=0), [], lambda ids, logits: -logits),
        (Sampling(top_k=0, top_p=0.9, seed=1), [], None),
    ],
)
def test_what_is_known_of_blocks_changes_no_token(
    sampling: Sampling, forbidden: Iterable[int], processor: LogitsProcessor | None
) -> None:
    rng = np.random.default_rng(0)
    never = np.array(forbidden, np.intp)
    plain, knowing = (Sampler(sampling, [1, 2], never, processor) for _ in range(2))
    for _ in range(20):
        logits = rng.normal(size=500).astype(np.float32) * 3
        assert knowing(logits, maxima=maxima_of(logits)) == plain(logits)


def test_temperature_0_is_the_likeliest_with_penalties_applied() -> None:
    logits = np.array([1.0, 3.0, 2.9, -1.0], np.float32)
    assert Sampler(Sampling(temperature=0))(logits) == 1
    assert Sampler(Sampling(temperature=0, repetition_penalty=1.1), [1])(logits) == 2
    assert Sampler(Sampling(temperature=0), (), np.array([1]))(logits) == 2


def test_presence_penalty_leaves_the_prompt_alone() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    sampler = Sampler(Sampling(temperature=0, presence_penalty=1.5), prompt=[1])
    assert [sampler(logits) for _ in range(3)] == [1, 2, 1]  # 3; then 1.5 against 2; then 1.5 against 0.5
    assert logits.tolist() == [1.0, 3.0, 2.0]


def test_frequency_penalty_grows_with_every_time_and_leaves_the_prompt_alone() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.6), prompt=[1, 1, 1, 1, 1])
    assert [sampler(logits) for _ in range(5)] == [1, 1, 2, 1, 2]  # 3, 2.4, 1.8; 2, 1.4
    counted = Sampler(Sampling(temperature=0, frequency_penalty=0.6))
    counted.add(1)
    counted.add(1)
    assert counted(logits) == 2


def test_bias_favours_and_forbids() -> None:
    logits = np.array([1.0, 3.0, 2.0, 9.0], np.float32)
    missing = np.array([3])
    assert Sampler(Sampling(temperature=0, logit_bias={1: -np.inf}), (), missing)(logits) == 2
    assert Sampler(Sampling(temperature=0, logit_bias={0: 2.5}), (), missing)(logits) == 0
    assert Sampler(Sampling(temperature=0, logit_bias={3: 100}), (), missing)(logits) == 1  # there is no such token
    assert logits.tolist() == [1.0, 3.0, 2.0, 9.0]
    everything = Sampling(logit_bias=dict.fromkeys(range(3), -np.inf))
    with pytest.raises(OptionError, match="logit_bias and logits_processor leave a greatest logit of -inf"):
        Sampler(everything, (), missing)(logits)


def test_a_bias_is_a_copy_and_options_stay_hashable() -> None:
    bias = {5: 1.0}
    sampling = Sampling(logit_bias=bias)
    bias[5] = 7.0
    assert sampling.logit_bias == {5: 1.0}
    assert hash(sampling) == hash(Sampling(logit_bias={5: 1}))
    assert sampling == Sampling(logit_bias={5: 1})


@pytest.mark.parametrize("forbidden", [[3, 4], [0, 3, 4]])
def test_a_processor_sees_everything_and_changes_what_it_likes(forbidden: list[int]) -> None:
    logits = np.array([1.0, 3.0, 2.0, 9.0, 9.0], np.float32)
    calls: list[tuple[list[int], np.ndarray]] = []

    def processor(ids: list[int], x: NDArray[np.float32]) -> list[float] | None:
        assert x.dtype == np.float32
        calls.append((list(ids), x.copy()))
        ids.clear()  # its own list
        x[2] += 5.0
        x[forbidden] = 100.0
        return None if len(calls) == 1 else [0.0, 1.0, 0.0, 0.0, 0.0]

    sampling = Sampling(temperature=0, presence_penalty=1.0, logit_bias={1: -0.5})
    sampler = Sampler(sampling, [4, 4], np.array(forbidden), processor)
    assert [sampler(logits), sampler(logits)] == [2, 1]
    assert [ids for ids, _ in calls] == [[4, 4], [4, 4, 2]]
    assert calls[0][1].tolist() == [1.0, 2.5, 2.0, 9.0, 9.0]
    assert calls[1][1].tolist() == [1.0, 2.5, 1.0, 9.0, 9.0]
    assert logits.tolist() == [1.0, 3.0, 2.0, 9.0, 9.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.zeros(3), r"returned shape \(3,\), not \(5,\)"),
        (np.zeros((1, 5)), r"returned shape \(1, 5\)"),
        ("text", "returned str, not an array"),
        (object(), "returned object, not an array"),
        (np.full(5, np.nan), "greatest logit of nan"),
        (np.full(5, -np.inf), "greatest logit of -inf"),
    ],
)
def test_what_a_processor_may_not_return(result: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sampler(Sampling(), (), None, lambda ids, x: result)(np.zeros(5, np.float32))


def test_top_p_takes_the_likeliest_even_alone() -> None:
    logits = np.array([0.0, 9.0, 0.0], np.float32)
    assert {Sampler(Sampling(top_p=p, seed=i))(logits) for i in range(50) for p in (0, 1e-9, 0.5)} == {1}


def test_a_tiny_temperature_is_greedy_without_warnings() -> None:
    logits = np.array([3.0, 2.9, -np.inf], np.float32)
    for temperature in (1e-3, 1e-300, 5e-324):
        assert Sampler(Sampling(temperature=temperature))(logits) == 0


def test_a_seed_repeats_and_none_does_not() -> None:
    logits = np.zeros(10_000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler(logits) for _ in range(8)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5}, {}])
def test_logits_that_are_not_finite_are_refused(bad: float, options: dict[str, Any]) -> None:
    logits = np.zeros(1000, np.float32)
    logits[500] = bad
    with pytest.raises(FormatError, match="damaged weights"):
        Sampler(Sampling(**options))(logits)


def test_nothing_left_to_draw_is_refused() -> None:
    with pytest.raises(FormatError, match="-inf"):
        Sampler(Sampling())(np.full(5, -np.inf, np.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": float("nan")},
        {"logit_bias": [1]},
        {"logit_bias": {"5": 1}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {True: 1}},
        {"logit_bias": {5: "1"}},
        {"logit_bias": {5: float("nan")}},
        {"logit_bias": {5: float("inf")}},
        {"seed": -1},
        {"seed": 1.0},
    ],
    ids=str,
)
def test_impossible_values_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=rf"^{name}.* (is|key) .*must be"):
        Sampling(**options)


def test_options_override_the_models_own() -> None:
    own = Sampling(temperature=0.6, top_k=20, top_p=0.95)
    assert own.override({}) == own
    assert own.override({"top_k": 5, "seed": 1, "top_p": None}) == Sampling(0.6, 5, 0.95, seed=1)
    with pytest.raises(OptionError, match=r"unknown option 'temprature'; did you mean temperature\?"):
        own.override({"temprature": 1})
    with pytest.raises(OptionError, match=r"unknown option 'xyzzy'; choose from max_tokens, stop, .*, temperature"):
        own.override({"xyzzy": 1})


def test_a_filter_that_greedy_sampling_would_ignore_is_refused() -> None:
    greedy = Sampling(temperature=0, top_k=20)
    with pytest.raises(OptionError, match="give a temperature"):
        greedy.override({"top_p": 0.9})
    assert greedy.override({"top_p": 0.9, "temperature": 0.7}) == Sampling(0.7, 20, 0.9)
    assert greedy.override({"top_p": 0.9, "temperature": 0}).temperature == 0
    assert greedy.override({"presence_penalty": 1.0}).presence_penalty == 1.0


def test_a_filter_that_is_off_may_be_given_to_a_greedy_model() -> None:
    greedy = Sampling(temperature=0, top_k=20)
    assert greedy.override({"top_p": 1, "top_k": 0, "min_p": 0}) == Sampling(temperature=0)
    with pytest.raises(OptionError, match=r"^min_p has no effect"):
        greedy.override({"top_p": 1, "min_p": 0.1})
