"""A session's text: prompts as text or ids, every token that was drawn, going on without a repetition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY
from reference import ReferenceModel

from npqwen.errors import ContextLengthError, OptionError
from npqwen.generation.generate import generate, stream
from npqwen.generation.session import Session
from npqwen.generation.stream import Stream

PROMPT = "A river is a"
GREEDY: dict[str, Any] = {"temperature": 0, "logit_bias": {4096: -float("inf"), 4098: -float("inf")}}
"""The likeliest token, but no eos: texts are as long as they may be."""


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return ReferenceModel.from_directory(TINY, context=120)


def test_text_and_ids_are_the_same_prompt(model: ReferenceModel) -> None:
    ids = model.tokenizer.encode(PROMPT)
    expected = Stream(model, ids, max_tokens=6, **GREEDY).completion().ids
    for prompt in (PROMPT, ids, tuple(ids), np.array(ids, np.int32)):
        session = Session(model)
        assert session.stream(prompt, max_tokens=6, **GREEDY).completion().ids == expected
        assert session.ids == ids + expected
        assert stream(model, prompt, max_tokens=6, **GREEDY).completion().ids == expected
        done = generate(model, prompt, max_tokens=6, **GREEDY)
        assert done.ids == expected
    both = generate(model, [ids, model.tokenizer.encode("17")], max_tokens=2, **GREEDY)
    assert [done.ids for done in both] == [expected[:2], generate(model, "17", max_tokens=2, **GREEDY).ids]


def test_ids_have_every_token_drawn_and_the_cache_all_but_the_last(model: ReferenceModel) -> None:
    session = Session(model)
    drawn = session.stream(PROMPT, max_tokens=5, **GREEDY)
    for count, _ in enumerate(drawn, 1):
        assert session.ids == drawn.prompt_ids + drawn.ids
        assert len(drawn.ids) >= count
    assert session.ids == drawn.prompt_ids + drawn.ids
    assert session.cache.length == len(session.ids) - 1
    assert session.text == PROMPT + drawn.text


@pytest.mark.parametrize("lengths", [(1, 1, 1), (4, 9), (7, 1, 5)])
def test_continuing_gives_what_one_longer_stream_gives(model: ReferenceModel, lengths: tuple[int, ...]) -> None:
    whole = Stream(model, model.tokenizer.encode(PROMPT), max_tokens=sum(lengths), **GREEDY).completion()
    session = Session(model)
    parts = [session.stream(PROMPT, max_tokens=lengths[0], **GREEDY).completion()]
    parts += [session.continue_(max_tokens=length, **GREEDY).completion() for length in lengths[1:]]
    assert [id for part in parts for id in part.ids] == whole.ids
    assert session.text == PROMPT + whole.text
    for earlier, part in pairwise(parts):
        assert part.usage.cached_tokens == earlier.usage.prompt_tokens + earlier.usage.generated_tokens - 1


def test_continuing_a_stream_that_was_left_keeps_what_it_drew(model: ReferenceModel) -> None:
    whole = Stream(model, model.tokenizer.encode(PROMPT), max_tokens=12, **GREEDY).completion()
    session = Session(model)
    left = session.stream(PROMPT, **GREEDY)
    next(left)
    begun = list(left.ids)
    rest = session.continue_(max_tokens=12 - len(begun), **GREEDY).completion()
    assert begun + rest.ids == whole.ids


def test_appending_is_reading_the_whole_text(model: ReferenceModel) -> None:
    session = Session(model)
    session.append(PROMPT)
    session.continue_(max_tokens=3, **GREEDY).completion()
    before, more = session.ids, model.tokenizer.encode(" Suddenly")
    logits = session.append(" Suddenly")
    assert session.ids == before + more
    assert session.cache.length == len(session.ids)
    fresh = model.prefill(session.ids, model.new_cache())
    np.testing.assert_allclose(logits, fresh, atol=1e-5)
    session.append(np.array([5, 6]))
    assert session.ids == [*before, *more, 5, 6]


def test_prefilling_returns_the_logits_also_of_what_is_cached(model: ReferenceModel) -> None:
    session = Session(model)
    ids = model.tokenizer.encode("What is 17 + 25? It is")
    for part in (ids, ids, ids[:3], ids):
        logits = session.prefill(part)
        assert session.ids == part
        assert session.cache.length == len(part)
        np.testing.assert_allclose(logits, model.prefill(part, model.new_cache()), atol=1e-5)
    assert logits.shape == (model.config.vocab_size,)


def test_what_cannot_be_read_is_refused_and_nothing_changes(model: ReferenceModel) -> None:
    session = Session(model)
    with pytest.raises(OptionError, match="the session is empty, so there is nothing to continue"):
        session.continue_()
    session.prefill(PROMPT)
    held = session.ids
    wrong: list[Any] = ["", [], None, 3, 1.5, b"text", [1.5], ["a"], [True], [None], "\ud800"]
    for value in wrong:
        for call in (session.stream, session.prefill, session.append):
            with pytest.raises(OptionError):
                call(value)
    with pytest.raises(ContextLengthError, match=f"^{len(held)} tokens and 118 more exceed the context of 120"):
        session.append([5] * 118)
    session.append([5] * (120 - len(held)))  # just fits
    with pytest.raises(ContextLengthError, match="the prompt is too long: it takes 120 tokens, and the context is 120"):
        session.continue_()
    assert session.ids == held + [5] * (120 - len(held))


def test_the_models_methods_keep_what_they_computed_in_a_session(model: ReferenceModel) -> None:
    session = Session(model)
    first = generate(model, PROMPT, session=session, max_tokens=4, **GREEDY)
    assert session.text == PROMPT + first.text
    again = generate(model, session.ids, session=session, max_tokens=4, **GREEDY)
    assert again.usage.cached_tokens == len(session.ids) - 4 - 1
    streamed = stream(model, session.ids, session=session, max_tokens=2, **GREEDY)
    assert streamed.completion().usage.cached_tokens == len(session.ids) - 2 - 1
    many = generate(model, ["17 + 25", "17 + 26"], session=session, max_tokens=2, n=2, seed=3)
    alone = [generate(model, prompt, max_tokens=2, n=2, seed=3) for prompt in ("17 + 25", "17 + 26")]
    assert [[done.ids for done in samples] for samples in many] == [[d.ids for d in samples] for samples in alone]
    assert session.text == "17 + 26" + many[1][0].text
    other = ReferenceModel.from_directory(TINY)
    calls: tuple[Callable[..., Any], ...] = (stream, generate)
    for call in calls:
        with pytest.raises(OptionError, match="session is 3; it must be a Session of this model"):
            call(model, PROMPT, session=3)
        with pytest.raises(OptionError, match="another model"):
            call(other, PROMPT, session=session)


def test_representations_say_how_full_a_session_is(model: ReferenceModel) -> None:
    session = Session(model)
    assert repr(session) == "<Session: 0 of 120 tokens>"
    session.stream([1, 2, 3], max_tokens=2, **GREEDY).completion()
    assert repr(session) == "<Session: 5 of 120 tokens, 4 of them computed>"
