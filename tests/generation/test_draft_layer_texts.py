"""A hybrid's own draft layer: texts stay the same to the bit, and its draft tokens are used where they pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npqwen
from npqwen.engine.hidden_tail import KEPT
from npqwen.engine.pass_times import PassTimes
from npqwen.errors import OutOfMemoryError
from npqwen.generation.batch import Batch
from npqwen.generation.drafting import Drafting
from npqwen.generation.generate import generate
from npqwen.generation.layer_drafter import LayerDrafter, LayerStatistics
from npqwen.generation.speculation import PASS, Speculation
from npqwen.generation.stream import Stream
from npqwen.model import Model

TRAINED = np.load(Path(__file__).parents[1] / "data" / "mtp.npz")
QUESTIONS = [
    f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n{thought}"
    for question in ("Define anger.", "What is 1 + 24?", "Weather in Oslo?")
    for thought in ("", "\n</think>\n\n")
]


@pytest.fixture(scope="module")
def model(hybrid: Callable[[str, int], Path]) -> Iterator[Model]:
    with npqwen.load(hybrid("mtp", 16), threads=1) as loaded:
        yield loaded


@pytest.fixture
def forgetful(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model, whose texts do not know earlier ones, so that only the draft layer drafts."""
    monkeypatch.setattr(model, "_drafting", Drafting(model.passes, layer=LayerStatistics(model)))
    monkeypatch.setattr(Drafting, "remember", lambda self, ids: None)
    return model


def test_texts_are_the_same_and_most_draft_tokens_are_right(forgetful: Model) -> None:
    drafted = accepted = 0
    for seed in range(18):
        options: dict[str, Any] = {"max_tokens": 40, "seed": seed, "temperature": (0, 0.7, 1.2)[seed % 3]}
        options |= ({}, {"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 1.2})[seed % 4]
        question = QUESTIONS[seed % len(QUESTIONS)]
        plain = generate(forgetful, question, speculation=False, **options)
        assert not plain.usage.drafted_tokens
        speculative = generate(forgetful, question, speculation=True, **options)
        assert speculative.ids == plain.ids
        assert generate(forgetful, question, **options).ids == plain.ids
        drafted, accepted = drafted + speculative.usage.drafted_tokens, accepted + speculative.usage.accepted_tokens
    assert drafted > 100
    assert accepted > drafted / 2
    layer = forgetful.drafting.layer
    assert layer is not None
    assert min(one.decided for one in layer.by_state) > 0  # both kinds of states were tried


def test_logprobs_of_accepted_draft_tokens_are_those_of_the_text_alone(forgetful: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "top_logprobs": 3}
    plain, speculative = (generate(forgetful, QUESTIONS[1], speculation=wanted, **options) for wanted in (False, True))
    assert speculative.usage.accepted_tokens > 3
    assert speculative.logprobs == plain.logprobs


def test_draft_tokens_are_those_of_torch_and_follow_the_text(model: Model) -> None:
    ids = TRAINED["ids"].tolist()
    for name, normed in (("before", False), ("after", True)):
        layer = LayerStatistics(model)
        for one, tried in zip(layer.by_state, ((0, 40), (40, 40)) if normed else ((40, 40), (0, 40)), strict=True):
            one.add(*tried)
        assert layer.normed == normed
        cache, drafter = model.new_cache(), LayerDrafter(layer, ids)
        drafter.follow(cache)
        assert not drafter.catch_up()  # nothing is known yet
        model.forward(ids[:-1], cache)

        def draft_tokens(drafter: LayerDrafter = drafter, most: int = 3) -> list[int]:
            assert drafter.catch_up()
            found: list[int] = []
            while len(found) < most:
                draft_token = drafter.next(found)
                assert draft_token is not None
                found.append(draft_token.id)
            return found

        want = TRAINED[f"{name}-draft_tokens"].tolist()
        assert draft_tokens() == want
        assert draft_tokens() == want  # after its own draft tokens
        drafter.extend([want[0], 300])
        assert not drafter.catch_up()  # of two further tokens the states are not known
        model.forward([ids[-1], want[0]], cache)
        late = draft_tokens()
        other = LayerDrafter(layer, [*ids, want[0], 300])  # whose cache begins here, with another state
        fresh = model.new_cache()
        other.follow(fresh)
        model.forward([*ids, want[0]], fresh)
        assert draft_tokens(other) == late
        other.leave()
        assert fresh.tail is None
        assert not other.catch_up()


def test_a_long_prompt_is_seen_by_its_end(model: Model) -> None:
    ids = np.tile(TRAINED["ids"], 10)[:1000].tolist()
    drafter, cache = LayerDrafter(LayerStatistics(model), ids), model.new_cache()
    drafter.follow(cache)
    model.forward(ids[:-1], cache)
    assert drafter.catch_up()
    assert drafter.next([]) is not None
    assert drafter._cache is not None
    assert drafter._cache.length == KEPT
    # After long silence it begins anew.
    more = np.tile(TRAINED["ids"], 3)[: KEPT + 40].tolist()
    drafter.extend(more)
    for id in [ids[-1], *more[:-1]]:
        model.forward([id], cache)
    assert drafter.catch_up()
    assert drafter.next([]) is not None
    assert drafter._cache.length == KEPT


def test_conversations_forks_and_batches(forgetful: Model) -> None:
    plain, session = npqwen.Session(forgetful), npqwen.Session(forgetful)
    prompt, drafted = "", 0
    for turn, question in enumerate(QUESTIONS):
        prompt += question
        options: dict[str, Any] = {"max_tokens": 25, "seed": turn, "temperature": 0.8}
        want = plain.stream(prompt, speculation=False, **options).completion()
        found = session.stream(prompt, speculation=True, **options).completion()
        assert found.ids == want.ids
        drafted += found.usage.drafted_tokens
        assert session.cache.tail is None  # it copies no states for nobody
        prompt = prompt + found.text[: len(found.text) // 2]  # cut back
    assert drafted
    options = {"max_tokens": 25, "temperature": 0.9, "seed": 3}
    want_all = generate(forgetful, QUESTIONS[0], n=4, speculation=False, **options)
    found_all = generate(forgetful, QUESTIONS[0], n=4, speculation=True, **options)
    assert [one.ids for one in found_all] == [one.ids for one in want_all]


def test_texts_of_a_batch_draft_only_while_they_are_alone(forgetful: Model) -> None:
    options: dict[str, Any] = {"temperature": 0, "logit_bias": {4098: -1e9, 4096: -1e9}}
    lengths = [10, 45]
    plain = [generate(forgetful, QUESTIONS[1], speculation=False, max_tokens=most, **options).ids for most in lengths]
    batch = Batch(forgetful)
    streams = [
        Stream(forgetful, QUESTIONS[1], batch=batch, speculation=True, max_tokens=most, **options) for most in lengths
    ]
    assert [stream.completion().ids for stream in streams] == plain
    assert streams[1].usage.accepted_tokens > 0


def test_forced_tokens_and_structures(forgetful: Model) -> None:
    def text(wanted: bool) -> list[int]:
        stream = Stream(forgetful, QUESTIONS[2], speculation=wanted, max_tokens=60, temperature=0)
        for at, _ in enumerate(stream):
            if at in (3, 12):
                stream.force([300, 301, 302, 303])
        return stream.ids

    assert text(True) == text(False)


def test_without_memory_for_the_layers_cache_texts_go_on(forgetful: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0}
    want = generate(forgetful, QUESTIONS[0], speculation=False, **options).ids

    def failing(*args: Any, **options: Any) -> Any:
        raise OutOfMemoryError("no memory")

    monkeypatch.setattr(forgetful.draft_layer, "run", failing)
    assert generate(forgetful, QUESTIONS[0], speculation=True, **options).ids == want


def test_the_kind_of_states_is_decided_by_acceptance(model: Model) -> None:
    layer = LayerStatistics(model)
    before, after = layer.by_state
    kinds = []
    while min(one.decided + one.passed_over for one in layer.by_state) < 32:
        kinds.append(layer.normed)
        if layer.normed:
            after.add(2, 3)
        elif len(kinds) % 2:
            before.add(0, 1)
        else:
            before.pass_over(pays=False)
    assert kinds[0] is False
    assert sum(a != b for a, b in pairwise(kinds)) >= 6  # they take turns
    assert layer.normed
    before.add(1000, 1000)
    assert not layer.normed


@pytest.mark.parametrize(("cost", "pays"), [(0.05, True), (0.95, False)])
def test_it_is_run_only_where_its_draft_tokens_pay(
    model: Model, cost: float, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = PassTimes(sparse=False)
    times.add(1, 1.0)
    times.add(16, 1.5)
    layer = LayerStatistics(model)
    for one in layer.by_state:
        monkeypatch.setattr(one, "cost", lambda passes: cost)
    ids = TRAINED["ids"].tolist()
    speculation, cache = Speculation(Drafting(times, layer=layer), ids), model.new_cache()
    speculation.follow(cache)
    model.forward(ids[:-1], cache)
    monkeypatch.setattr(speculation._text, "propose", lambda most: None)
    assert bool(speculation.propose([], PASS, 1)) == pays
    assert speculation.propose([], PASS, 2, alone=False) == []
    assert sum(one.passed_over for one in layer.by_state) == (not pays)
    speculation.close([])
    assert cache.tail is None


def test_a_draft_model_that_is_given_goes_first(hybrid: Callable[[str, int], Path]) -> None:
    path = hybrid("mtp", 16)
    with npqwen.load(path, threads=1) as small, npqwen.load(path, threads=1, draft=small) as model:
        found = generate(model, QUESTIONS[0], speculation=True, max_tokens=20, temperature=0)
        assert found.ids == generate(model, QUESTIONS[0], speculation=False, max_tokens=20, temperature=0).ids
        layer = model.drafting.layer
        assert layer is not None
        assert not any(one.decided for one in layer.by_state)
        assert model.drafting.model is not None
        assert model.drafting.model.decided
