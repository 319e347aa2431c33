"""Stop strings in a chat: they end the answer, but not its reasoning or its calls."""

from __future__ import annotations

import random
from typing import Any

import pytest
from reciter import Reciter, without_ids

from npqwen.chat.events import AnswerEvent, Reasoning, Text
from npqwen.chat.text_stop import TextStop
from npqwen.errors import OptionError
from npqwen.tools.calls import ToolCall

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "STOP"}}\n</tool_call>'
STOPPED = ToolCall("get_weather", {"city": "STOP"})


def get_weather(city: str) -> str:
    """Get the weather."""
    return "sunny"


def test_reasoning_may_contain_a_stop_string() -> None:
    reply = Reciter("<think>\nNot a STOP yet.\n</think>\n\nOne STOP two.").chat("?", stop="STOP")
    assert (reply.reasoning, reply.text, reply.finish_reason) == ("Not a STOP yet.", "One ", "stop")
    assert reply.messages == [{"role": "assistant", "content": "One ", "reasoning_content": "Not a STOP yet."}]


@pytest.mark.parametrize("stop", ["\n", "\n\n", "</think>", "think"])
def test_what_stands_between_reasoning_and_answer_is_not_text(stop: str) -> None:
    reply = Reciter("<think>\nA\n\nB\n</think>\n\nOne two.").chat("?", stop=stop)
    assert (reply.reasoning, reply.text) == ("A\n\nB", "One two.")


def test_a_call_may_contain_a_stop_string_but_not_the_text_around_it() -> None:
    model = Reciter(f"Let me see.\n{CALL}", "One STOP two.", f"A STOP\n{CALL}")
    talk = model.conversation(tools=[get_weather], run_tools=True, thinking=False, stop=iter(["STOP"]))
    reply = talk.send("?")
    assert without_ids(result.call for result in reply.tool_results) == [STOPPED]
    assert (reply.text, reply.finish_reason) == ("One ", "stop")
    cut = model.chat("?", tools=[get_weather], thinking=False, stop=["STOP"])
    assert (cut.text, cut.tool_calls, cut.finish_reason) == ("A ", [], "stop")


def test_text_that_never_becomes_a_stop_string_is_passed_on() -> None:
    assert Reciter("One STO").chat("?", thinking=False, stop="STOP").text == "One STO"
    limited = Reciter("One STOP").chat("?", thinking=False, stop="STOPS", max_tokens=3)
    assert limited.finish_reason == "length"
    assert limited.text
    assert "One STOP".startswith(limited.text)


def test_a_stop_string_may_be_completed_by_the_last_token() -> None:
    reply = Reciter("1234").chat("?", thinking=False, stop="34", max_tokens=4)
    assert (reply.text, reply.finish_reason) == ("12", "stop")


def test_a_special_tokens_name_ends_the_answer_at_that_token() -> None:
    reply = Reciter("One<|im_start|>two").chat("?", thinking=False, stop=["<|im_start|>", "nowhere"])
    assert (reply.text, reply.finish_reason) == ("One", "stop")


def test_nothing_is_computed_after_a_stop_string() -> None:
    model = Reciter("One STOP" + " two" * 100)
    reply = model.chat("?", thinking=False, stop="STOP")
    assert reply.usage.generated_tokens < 12


@pytest.mark.parametrize("stop", [5, "", "\ud800", [None]])
def test_wrong_stop_strings_are_refused_before_anything_runs(stop: Any) -> None:
    model = Reciter("One")
    with pytest.raises(OptionError, match=r"^stop (is|has) "):
        model.stream_chat("?", stop=stop)
    assert model.read == []


def test_the_result_does_not_depend_on_how_the_text_is_divided() -> None:
    rng = random.Random(0)
    call = ToolCall("f", {}, "call_0")
    for _ in range(300):
        text = "".join(rng.choices("ab\n", k=20))
        stop = "".join(rng.choices("ab\n", k=3))
        pieces: list[AnswerEvent] = [Reasoning(stop)]
        rest = text
        while rest:
            cut = rng.randrange(1, 5)
            pieces.append(Text(rest[:cut]))
            rest = rest[cut:]
        pieces.append(call)
        ender = TextStop([stop])
        passed = [*ender.push(pieces)]
        if ender.found is None:
            passed += ender.finish()
        assert passed[0] == Reasoning(stop)
        assert "".join(piece.text for piece in passed[1:] if isinstance(piece, Text)) == text.partition(stop)[0]
        assert (passed[-1] == call) == (stop not in text)
