"""A draft model: texts stay the same, its cache follows them, and it drafts only where that pays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import npqwen
from npqwen.engine.pass_times import PassTimes
from npqwen.errors import OptionError
from npqwen.generation.batch import Batch
from npqwen.generation.drafting import ANSWERS, Drafting
from npqwen.generation.generate import generate
from npqwen.generation.model_drafter import DraftModel, ModelDrafter
from npqwen.generation.speculation import PASS, Speculation
from npqwen.generation.stream import Stream
from npqwen.model import Model

QUESTION = "<|im_start|>user\nDefine anger.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def pair(tiny: Any) -> Iterator[Model]:
    """The tiny model at 16 bits, whose draft model is itself at 3 bits."""
    with npqwen.load(tiny(16), threads=1, draft=tiny(3)) as model:
        yield model


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    """What a model says by itself: the likeliest tokens, each from a pass over the whole text."""
    found: list[int] = []
    for _ in range(count):
        found.append(int(model.logits(ids + found)[-1].argmax()))
    return found


def test_texts_are_the_same_with_a_draft_model(pair: Model) -> None:
    drafted = accepted = 0
    for seed in range(12):
        options: dict[str, Any] = {"max_tokens": 50, "seed": seed, "temperature": (0, 0.7, 1.2)[seed % 3]}
        plain = generate(pair, QUESTION, speculation=False, **options)
        for wanted in (True, None):
            speculative = generate(pair, QUESTION, speculation=wanted, **options)
            assert speculative.ids == plain.ids
            drafted, accepted = drafted + speculative.usage.drafted_tokens, accepted + speculative.usage.accepted_tokens
    assert 60 < accepted < drafted


def test_it_drafts_what_the_draft_model_would_say(pair: Model) -> None:
    assert pair.draft is not None
    ids = pair.tokenizer.encode(QUESTION)
    drafter = ModelDrafter(DraftModel(pair.draft, pair), ids)
    expected = greedy(pair.draft, ids, 5)
    assert drafter.catch_up()
    draft_tokens: list[int] = []
    for _ in range(5):
        draft_token = drafter.next(draft_tokens)
        assert draft_token is not None
        draft_tokens.append(draft_token.id)
    assert draft_tokens == expected
    other = next(id for id in range(300, 400) if id != expected[2])
    drafter.extend([*expected[:2], other])  # the third was wrong
    assert drafter.catch_up()
    draft_token = drafter.next([])
    assert draft_token is not None
    assert [draft_token.id] == greedy(pair.draft, [*ids, *expected[:2], other], 1)


def test_it_computes_as_much_of_the_vocabulary_as_the_text_needs(pair: Model) -> None:
    assert pair.draft is not None
    size = pair.config.vocab_size
    parts = {300: size // 4 // 16 * 16, 1900: size // 2 // 16 * 16, 4000: size}
    for ids, expected in (([300, id] * 40, most) for id, most in parts.items()):
        drafter = ModelDrafter(DraftModel(pair.draft, pair), ids)
        assert drafter.catch_up()
        draft_token = drafter.next([])
        assert draft_token is not None
        assert draft_token.id == pair.draft.logits(ids)[-1][:expected].argmax()


def test_its_cache_catches_up_chunk_by_chunk(pair: Model) -> None:
    assert pair.draft is not None
    ids = np.random.default_rng(0).integers(300, 4000, 700).tolist()
    pair.draft.prefixes.clear()
    drafter = ModelDrafter(DraftModel(pair.draft, pair), ids)
    assert [drafter.catch_up() for _ in range(4)] == [False, False, True, True]
    draft_token = drafter.next([])
    assert draft_token is not None
    assert [draft_token.id] == greedy(pair.draft, ids, 1)
    drafter.close()
    again = ModelDrafter(DraftModel(pair.draft, pair), ids)  # what it computed is in the draft model's pool
    assert again.catch_up()


def test_a_text_that_outgrows_the_draft_models_context_goes_on_without(tiny: Any) -> None:
    with npqwen.load(tiny(4), threads=1, context=20) as small, npqwen.load(tiny(16), threads=1, draft=small) as model:
        options: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "logit_bias": {4098: -1e9, 4096: -1e9}}
        plain = generate(model, QUESTION, speculation=False, **options)
        assert generate(model, QUESTION, speculation=True, **options).ids == plain.ids


def test_texts_of_a_batch_draft_only_while_they_are_alone(pair: Model) -> None:
    options: dict[str, Any] = {"temperature": 0, "logit_bias": {4098: -1e9, 4096: -1e9}}
    lengths = [10, 40]
    plain = [generate(pair, QUESTION, speculation=False, max_tokens=most, **options).ids for most in lengths]
    assert pair.draft is not None
    batch = Batch(pair)
    streams = [
        Stream(pair, QUESTION, batch=batch, speculation=True, max_tokens=most, **options) for most in lengths
    ]
    assert [stream.completion().ids for stream in streams] == plain
    assert streams[1].usage.accepted_tokens > 0


def test_a_batchs_memory_holds_the_draft_models_keys_and_values_too(tiny: Any) -> None:
    options: dict[str, Any] = {"temperature": 0, "logit_bias": {4098: -1e9, 4096: -1e9}, "max_tokens": 700}
    with npqwen.load(tiny(16), threads=1, draft=tiny(3)) as pair:
        assert pair.draft is not None
        of_target, of_draft = (model.new_cache(1).page_bytes for model in (pair, pair.draft))
        plain = generate(pair, QUESTION, speculation=False, **options)
        limits = [3 * (of_target + of_draft), 3 * of_target + of_draft, 3 * of_target]
        for limit, drafts in zip(limits, (True, True, False), strict=True):
            pair.prefixes.clear()
            pair.draft.prefixes.clear()
            batch = Batch(pair, memory=limit)
            stream = Stream(pair, QUESTION, batch=batch, speculation=True, **options)
            most = 0
            for _ in stream:
                most = max(most, batch.cache_bytes)
            assert stream.completion().ids == plain.ids
            assert most <= limit
            kept = [page for model in (pair, pair.draft) for page in model.prefixes.arrays]
            assert batch.cache_bytes == sum(page.nbytes for page in kept) <= limit
            assert any(page.nbytes == of_draft for page in kept) == drafts


def priced(pair: Model, longest: float, cost: float, monkeypatch: pytest.MonkeyPatch) -> Drafting:
    """Passes of one token take 1 second and those of 16 `longest`, a draft token takes `cost`."""
    assert pair.draft is not None
    times = PassTimes(sparse=False)
    times.add(1, 1.0)
    times.add(16, longest)
    draft = DraftModel(pair.draft, pair)
    monkeypatch.setattr(draft, "cost", lambda passes: cost)
    return Drafting(times, draft)


@pytest.mark.parametrize(("cost", "drafts"), [(0.05, True), (0.9, False)])
def test_it_is_run_only_where_its_draft_tokens_pay(
    cost: float, drafts: bool, pair: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting = priced(pair, 1.5, cost, monkeypatch)
    ids = pair.tokenizer.encode(QUESTION)
    assert bool(Speculation(drafting, ids).propose([], PASS, 1)) == drafts
    assert Speculation(drafting, ids).propose([], PASS, 2, alone=False) == []
    assert Speculation(drafting, ids, always=True).propose([], PASS, 1)


def test_it_stops_when_its_draft_tokens_are_wrong_and_tries_again_rarely(
    pair: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting = priced(pair, 1.2, 0.15, monkeypatch)
    speculation = Speculation(drafting, pair.tokenizer.encode(QUESTION))
    tries = []
    for _ in range(250):
        draft = speculation.propose([], PASS, 1)
        tries.append(len(draft))
        speculation.learn(0, bool(draft))
    assert tries[0] > 1
    assert sum(map(bool, tries[50:])) < 30
    assert any(tries[50:])


def test_a_model_with_other_tokens_cannot_draft(tiny: Any, pair: Model) -> None:
    assert pair.draft is not None
    other = dict(pair.tokenizer.vocabulary)
    first, second = list(other)[300:302]
    other[first], other[second] = other[second], other[first]

    class Shuffled:
        name, config, weight_bytes = "shuffled", pair.config, 1

        class tokenizer:
            vocabulary = other

    with pytest.raises(OptionError, match="the draft model shuffled has other tokens than"):
        DraftModel(Shuffled(), pair)  # type: ignore[arg-type]


def test_the_loaded_draft_model_is_closed_with_its_model_and_a_given_one_is_not(tiny: Any) -> None:
    with npqwen.load(tiny(4), threads=1) as small:
        npqwen.load(tiny(16), threads=1, draft=small).close()
        assert small.logits([300]).shape[0] == 1
    model = npqwen.load(tiny(16), threads=1, draft=tiny(4))
    model.close()
    assert model.draft is not None
    with pytest.raises(npqwen.NpqwenError, match="closed"):
        model.draft.logits([300])


def test_draft_tokens_come_from_earlier_answers_too() -> None:
    drafting = Drafting()
    answer = list(range(100, 130))
    drafting.remember(answer)
    assert Speculation(drafting, [5, *answer[:4]], always=True).propose([], 3, 1) == answer[4:7]
    drafting.remember([1] * (ANSWERS + 5))
    assert drafting.with_answers([5]) == [*[1] * ANSWERS, -1, 5]
