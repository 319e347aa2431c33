"""Answers without a stream: several are written at once, by a driver of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from reciter import GREEDY, Reciter

from npqwen.chat.answer import Answer
from npqwen.chat.chat_options import ChatSettings
from npqwen.chat.events import Event, Finish, Notice
from npqwen.chat.messages import checked
from npqwen.chat.prepared_answer import prepare
from npqwen.errors import ContextLengthError, OptionError
from npqwen.generation.completion import Usage
from npqwen.generation.decoding import Decoding
from npqwen.generation.watches import option_watches

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
USAGE = Usage(0, 0, 0.0, 0.0, 0.0, 0)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Hello, world.", {}),
    ("<think>\nHm.\n</think>\n\nYes. STOP No.", {"stop": ["STOP"]}),
    (f"<think>\nSTOP\n</think>\n\nI look.\n{CALL}", {"stop": ["STOP"], "tools": [SCHEMA]}),
    (f"{CALL}\n{CALL}", {"tools": [SCHEMA], "thinking": False}),
    (CALL, {"tools": [SCHEMA], "max_tokens": 20}),
    ("a " * 300, {"logprobs": True}),
    ("Yes.<|im_start|>No.", {"stop": "<|im_start|>"}),
]


class Driver:
    """Runs one decoding a step at a time."""

    def __init__(self, text: str, options: Any, sampling: Any) -> None:
        options = options | {"seed": 3}  # for the calls' ids
        self.model = Reciter(text, sampling=sampling)
        self.prepared = prepare(self.model, ChatSettings.of(options), checked("?"))
        given = self.prepared.options
        limit = min(given.get("max_tokens") or 1000, self.model.context - len(self.prepared.prompt_ids))
        watches = option_watches(given)
        self.decoding = Decoding(self.model, self.prepared.prompt_ids, given, watches, limit=limit)
        self.answer = Answer(self.decoding, self.prepared.stops, self.prepared.schemas)
        self.cache = self.model.new_cache()
        self.finished = False

    def step(self) -> Iterator[Event]:
        ids, decoding = self.decoding.pending(), self.decoding
        logits = None
        if not decoding.ids and ids:
            logits = self.model.prefill(ids, self.cache).reshape(1, -1)
        elif ids:
            logits = self.model.forward(ids, self.cache, all_logits=decoding.rows > 1)
        yield from self.answer.push(decoding.accept(logits))
        if self.answer.stopped or decoding.finished:
            self.finished = True
            yield from self.answer.finish()


def test_answers_that_are_driven_by_turns_equal_those_of_a_stream() -> None:
    drivers = [Driver(text, options, GREEDY) for text, options in CASES]
    events: list[list[Event]] = [[] for _ in drivers]
    while not all(driver.finished for driver in drivers):
        for driver, own in zip(drivers, events, strict=True):
            if not driver.finished:
                own += driver.step()
    for (text, options), driver, own in zip(CASES, drivers, events, strict=True):
        with pytest.warns(match="greedy") if options.get("thinking") is not False else nullcontext():
            stream = Reciter(text, sampling=GREEDY).stream_chat("?", **options | {"seed": 3})
        expected: list[Event] = [event for event in stream if not isinstance(event, Notice | Finish)]
        reply = driver.answer.reply(USAGE, notices=driver.prepared.notices)
        assert stream.reply is not None
        assert own == expected
        assert reply == replace(stream.reply, usage=USAGE)


def test_stop_strings_are_divided_into_special_tokens_and_text() -> None:
    prepared = prepare(Reciter(), ChatSettings.of({"stop": ["END", "<|im_start|>"]}), checked("?"))
    assert (prepared.stops, prepared.options["stop"]) == (["END"], ["<|im_start|>"])


def test_sampling_is_that_of_the_mode_unless_given() -> None:
    for thinking, expected in ((True, 0.6), (False, 0.7)):
        prepared = prepare(Reciter(), ChatSettings.of({"thinking": thinking}), checked("?"))
        assert prepared.options.get("temperature", 0.6) == expected
        assert prepared.options["loop_guard"] is True
    prepared = prepare(Reciter(), ChatSettings.of({"thinking": False, "temperature": 0.2}), checked("?"))
    assert prepared.options["temperature"] == 0.2


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="and the context is 20;"):
        prepare(Reciter(context=20), ChatSettings.of({}), checked("a b c " * 20))
    with pytest.raises(OptionError, match="thinking"):
        prepare(Reciter(template="thinking-2507"), ChatSettings.of({"thinking": False}), checked("?"))


def test_an_answer_that_ended_early_is_a_message_without_its_calls() -> None:
    driver = Driver(f"Well. {CALL} and", {"tools": [SCHEMA], "thinking": False}, GREEDY)
    while not driver.answer.calls:
        list(driver.step())
    assert driver.answer.finish_reason is None
    assert driver.answer.message(calls=False) == {"role": "assistant", "content": "Well."}
    assert driver.answer.message()["tool_calls"] == [driver.answer.calls[0].as_message()]
