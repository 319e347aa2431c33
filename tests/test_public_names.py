"""What an editor shows: names, help texts, and options, which type checkers must know."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npqwen
from npqwen.chat.chat_model import ChatModel
from npqwen.chat.chat_options import CHAT_OPTIONS
from npqwen.generation.options import OPTIONS


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[npqwen.Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


def public(kind: type) -> Iterator[tuple[str, Any]]:
    return ((name, member) for name, member in vars(kind).items() if not name.startswith("_"))


def test_every_public_name_exists_and_explains_itself() -> None:
    for name in npqwen.__all__:
        thing = getattr(npqwen, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert thing.__doc__, name
            assert not thing.__doc__.startswith(f"{name}("), f"{name} has the docstring that dataclasses make"
    for kind in (npqwen.Model, npqwen.Session, npqwen.Conversation, npqwen.KVCache, npqwen.Stream, npqwen.ChatStream):
        for name, member in (pair for base in kind.__mro__[:-1] for pair in public(base)):
            assert inspect.getdoc(member), f"{kind.__name__}.{name}"


def test_help_shows_what_a_model_is() -> None:
    text = pydoc.plain(pydoc.render_doc(npqwen.Model))
    for name in ("bits", "config", "context", "kv", "name", "path", "threads", "tokenizer", "weight_bytes"):
        assert isinstance(inspect.getattr_static(npqwen.Model, name), property), name
        assert f" {name}\n" in text, name


def test_every_type_checker_sees_that_a_model_has_what_sessions_and_conversations_need() -> None:
    """To Pyright, a cached_property is not a property: `Session(model)` would be an error in an editor."""
    for protocol in ChatModel.__mro__:
        for name, member in vars(protocol).items():
            if isinstance(member, property):
                assert not isinstance(inspect.getattr_static(npqwen.Model, name, None), cached_property), name


def test_help_and_completion_at_a_prompt_show_all_options() -> None:
    for method, options in (
        (npqwen.Model.stream, [*OPTIONS]),
        (npqwen.Model.generate, [*OPTIONS]),
        (npqwen.Model.chat, [*CHAT_OPTIONS, *OPTIONS]),
        (npqwen.Model.stream_chat, [*CHAT_OPTIONS, *OPTIONS]),
        (npqwen.Model.conversation, [*CHAT_OPTIONS, *OPTIONS]),
        (npqwen.Conversation.send, [*CHAT_OPTIONS, *OPTIONS]),
        (npqwen.Session.stream, [*OPTIONS]),
        (npqwen.Session.continue_, [*OPTIONS]),
    ):
        parameters = inspect.signature(method).parameters
        assert set(options) <= set(parameters), method
        assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())


def test_what_a_model_is_has_types_and_cannot_be_changed(model: npqwen.Model) -> None:
    context: int = model.context
    bits: int = model.bits
    threads: int = model.threads
    size: int = model.weight_bytes
    name: str = model.name
    path: Path = model.path
    cache: npqwen.KVCache = model.new_cache()
    assert (context, bits, threads, name) == (2048, 4, 1, path.name)
    assert size > 1_000_000
    assert cache.limit == context
    with pytest.raises(AttributeError):
        model.context = 5  # type: ignore[misc]


def test_type_checkers_and_the_library_refuse_the_same_options(model: npqwen.Model) -> None:
    """mypy reads this file: an ignored error that is none would be an error."""
    with pytest.raises(npqwen.OptionError, match="did you mean temperature"):
        model.chat("hi", temprature=1)  # type: ignore[call-overload]
    with pytest.raises(npqwen.OptionError, match="max_tokens is 'ten'; it must be a whole number"):
        model.chat("hi", max_tokens="ten")  # type: ignore[call-overload]
    with pytest.raises(npqwen.OptionError, match="temperature is 'hot'; it must be a number"):
        model.generate("hi", temperature="hot")  # type: ignore[call-overload]
    with pytest.raises(npqwen.OptionError, match="did you mean max_tokens"):
        model.stream("hi", max_token=3)  # type: ignore[call-arg]
    with pytest.raises(npqwen.OptionError, match="top_k is 'all'"):
        model.stream("hi", top_k="all")  # type: ignore[arg-type]
    with pytest.raises(npqwen.OptionError, match="n is '2'"):
        model.chat("hi", n="2")  # type: ignore[call-overload]
    with pytest.raises(npqwen.OptionError, match="thinking is 'yes'"):
        model.conversation(thinking="yes")  # type: ignore[arg-type]
    with pytest.raises(npqwen.OptionError, match="tools is int"):
        model.stream_chat("hi", tools=3)  # type: ignore[arg-type]
    with pytest.raises(npqwen.OptionError, match="unknown option 'sed'"):
        model.conversation().send("hi", sed=1)  # type: ignore[call-arg]
    with pytest.raises(npqwen.OptionError, match="the prompt is 3"):
        npqwen.Session(model).stream(3)  # type: ignore[arg-type]
    with pytest.raises(npqwen.OptionError, match="continuations is 3"):
        model.score("hi", 3)  # type: ignore[call-overload]
    with pytest.raises(npqwen.OptionError, match="progress is 'no'"):
        npqwen.load(model.path, progress="no")  # type: ignore[arg-type]


def test_results_have_types(model: npqwen.Model) -> None:
    one: npqwen.Completion = model.generate("hi", max_tokens=1)
    several: list[npqwen.Completion] = model.generate("hi", max_tokens=1, n=2)
    each: list[npqwen.Completion] = model.generate(["hi", "ho"], max_tokens=1)
    table: list[list[npqwen.Completion]] = model.generate(["hi", "ho"], n=2, max_tokens=1)
    reply: npqwen.Reply = model.chat("hi", max_tokens=1, seed=1)
    replies: list[npqwen.Reply] = model.chat("hi", n=2, max_tokens=1, seed=1)
    score: npqwen.ContinuationScore = model.score("hi", " ho")
    scores: list[npqwen.ContinuationScore] = model.score("hi", [" ho", " hum"])
    assert [len(results) for results in (several, each, table, replies, scores)] == [2] * 5
    assert one.ids
    assert reply.finish_reason == "length"
    assert score.tokens


NOT_WHOLE: list[Any] = ["ten", b"10", 1.5, float("nan"), float("inf"), True, {}, 1j, np.bool_(True), np.float32(2)]


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_number_is_an_option_error(model: npqwen.Model, value: Any) -> None:
    for option in OPTIONS.values():
        numeric = isinstance(value, float | np.floating) and np.isfinite(value)
        if option.kind is int or (option.kind is float and not numeric):
            given: dict[str, Any] = {option.name: value}
            with pytest.raises(npqwen.OptionError, match=rf"^{option.name} is "):
                model.stream("hi", **given)
    calls: list[Callable[[Any], object]] = [
        lambda value: model.new_cache(value),
        lambda value: model.new_cache().reserve(value),
        lambda value: model.new_cache().truncate(value),
        lambda value: model.new_cache().fork(value),
        lambda value: model.hidden([1], layers=value),
        lambda value: npqwen.load(model.path, threads=value),
        lambda value: npqwen.load(model.path, context=value),
        lambda value: npqwen.load(model.path, bits=value),
        lambda value: npqwen.Session(model).prefill([value]),
        lambda value: model.score("hi", [[value]]),
        lambda value: model.forward([value], model.new_cache()),
        lambda value: model.logits([value]),
        lambda value: model.tokenizer.decode([value]),
        lambda value: model.generate("hi", n=value),
    ]
    for call in calls:
        with pytest.raises(npqwen.OptionError):
            call(value)


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, np.float32, np.float64], ids=lambda kind: kind.__name__)
def test_numbers_of_numpy_are_numbers(model: npqwen.Model, kind: Any) -> None:
    if issubclass(kind, np.integer):
        ids = model.generate("hi", max_tokens=kind(3), top_k=kind(5), seed=kind(1), logit_bias={kind(7): 1}).ids
        assert ids == model.generate("hi", max_tokens=3, top_k=5, seed=1, logit_bias={7: 1}).ids
        assert len(model.generate("hi", n=kind(2), max_tokens=kind(1))) == 2
        assert model.new_cache(kind(9)).limit == 9
    ids = model.generate("hi", max_tokens=3, temperature=kind(1), top_p=kind(1), seed=1).ids
    assert ids == model.generate("hi", max_tokens=3, temperature=1, top_p=1, seed=1).ids
