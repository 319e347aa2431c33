"""Answers to a conversation: with the small model in int4, and with one that recites what it is given."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reciter import Reciter, without_ids

import npqwen
from npqwen.chat.events import CallArguments, CallStart, Finish, Notice, Reasoning, Text
from npqwen.errors import ContextLengthError, OptionError
from npqwen.generation.session import Session
from npqwen.model import Model
from npqwen.tools.calls import ToolCall
from npqwen.tools.toolbox import ToolResult

GREEDY: dict[str, Any] = {"temperature": 0}
pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")


def get_weather(city: str) -> dict[str, Any]:
    """Get the current weather in a city."""
    return {"city": city, "degrees": 22, "sky": "sunny"}


def now() -> str:
    """Tell the time."""
    return "noon"


SCHEMA = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


# --- the small model, end to end ---


# Sums that the unquantized model gets right: it says 49 for 24 + 24, with 9 and 8 nearly equally likely.
@pytest.mark.parametrize(("a", "b"), [(17, 25), (30, 12), (11, 31), (25, 24)])
def test_numbers_are_added_with_and_without_thinking(model: Model, a: int, b: int) -> None:
    question = [{"role": "user", "content": f"What is {a} + {b}?"}]
    with_thought = model.chat(question, thinking=True, **GREEDY)
    without = model.chat(question, thinking=False, **GREEDY)
    assert with_thought.text == without.text == f"{a} + {b} = {a + b}"
    assert with_thought.reasoning.endswith(f" = {a + b}.")
    assert without.reasoning == ""
    assert with_thought.finish_reason == without.finish_reason == "stop"
    assert with_thought.messages == [
        {"role": "assistant", "content": with_thought.text, "reasoning_content": with_thought.reasoning}
    ]
    assert without.messages == [{"role": "assistant", "content": without.text}]


@pytest.mark.parametrize("thinking", [True, False])
def test_a_function_is_called_and_its_result_is_used_in_the_answer(model: Model, thinking: bool) -> None:
    asked = []

    def get_weather(city: str) -> dict[str, Any]:
        """Get the current weather in a city."""
        asked.append(city)
        return {"city": city, "degrees": 17, "sky": "foggy"}

    question = "What is the weather in London?"
    reply = model.chat(question, tools=[get_weather], run_tools=True, thinking=thinking, **GREEDY)
    assert asked == ["London"]
    assert reply.text == "It is 17 degrees and foggy in London."
    assert reply.finish_reason == "stop"
    assert reply.tool_calls == []
    assert [result.content for result in reply.tool_results] == ['{"city": "London", "degrees": 17, "sky": "foggy"}']
    assert [message["role"] for message in reply.messages] == ["assistant", "tool", "assistant"]


def test_tool_calls_are_returned_and_their_results_are_accepted(model: Model) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Weather in Tokyo?"}]
    reply = model.chat(messages, tools=[SCHEMA], **GREEDY)
    assert reply.finish_reason == "tool_calls"
    assert without_ids(reply.tool_calls) == [ToolCall("get_weather", {"city": "Tokyo"})]
    messages += reply.messages
    result = json.dumps({"city": "Tokyo", "degrees": 3, "sky": "windy"})
    messages.append({"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": result})
    assert model.chat(messages, tools=[SCHEMA], **GREEDY).text == "It is 3 degrees and windy in Tokyo."


def test_events_come_as_they_are_generated_and_add_up_to_the_reply(model: Model) -> None:
    stream = model.stream_chat("What is 17 + 25?", thinking=True, **GREEDY)
    events = []
    for event in stream:
        events.append(event)
        if isinstance(event, Reasoning | Text):
            assert stream.text == "".join(e.text for e in events if isinstance(e, Text))
            assert stream.reasoning == "".join(e.text for e in events if isinstance(e, Reasoning))
    kinds = [kind for kind, _ in itertools.groupby(events, type)]
    assert kinds == [Notice, Reasoning, Text, Finish]
    assert len(events) > 25
    last = events[-1]
    assert isinstance(last, Finish)
    assert last.reply is stream.reply
    assert last.reply == stream.reply
    assert stream.finish_reason == "stop"
    assert stream.run() is stream.reply


def test_a_seed_gives_the_same_answer_again(model: Model) -> None:
    def answer(seed: int) -> str:
        return model.chat("Define river.", temperature=1.5, top_k=0, top_p=1, seed=seed, max_tokens=20).reasoning

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


def test_a_thinking_budget_ends_the_reasoning_and_an_answer_follows(model: Model) -> None:
    reply = model.chat("What is 17 + 25?", thinking=True, thinking_budget=3, **GREEDY)
    assert reply.reasoning.startswith("1")
    assert reply.reasoning.endswith("I have to give the solution based on the thinking directly now.")
    assert reply.text
    assert "think>" not in reply.text


def test_logprobs_stops_and_limits_pass_through(model: Model) -> None:
    reply = model.chat("What is 17 + 25?", thinking=False, logprobs=True, max_tokens=4, **GREEDY)
    assert reply.finish_reason == "length"
    assert reply.logprobs is not None
    assert len(reply.logprobs) == 4
    stopped = model.chat("What is 17 + 25?", thinking=False, stop=" =", **GREEDY)
    assert (stopped.text, stopped.finish_reason) == ("17 + 25", "stop")


def test_the_models_template_renders_prompts(model: Model) -> None:
    assert model.render("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.render([{"role": "user", "content": "Hi"}], [SCHEMA], False).startswith("<|im_start|>system\n# Tools")


def test_a_session_does_not_compute_the_same_messages_again(model: Model) -> None:
    model.prefixes.clear()
    session = Session(model)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 17 + 25?"}]
    first = model.chat(messages, session=session, **GREEDY)
    messages += [*first.messages, {"role": "user", "content": "What is 30 + 12?"}]
    second = model.chat(messages, session=session, **GREEDY)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == first.usage.prompt_tokens
    assert second.text == model.chat(messages, **GREEDY).text == "30 + 12 = 42"


# --- running tools ---


def test_several_calls_run_in_order_and_share_one_turn() -> None:
    model = Reciter(f"I look.\n{CALL}\n{NOW}", "Sunny at noon.")
    reply = model.chat("?", tools=[get_weather, now], run_tools=True, thinking=False)
    assert reply.text == "Sunny at noon."
    calls = reply.messages[0]["tool_calls"]
    assert [result.call.as_message() for result in reply.tool_results] == calls
    assert reply.messages[0]["content"] == "I look."
    assert model.prompts[1].endswith(
        f"I look.\n{CALL}\n{NOW}<|im_end|>\n<|im_start|>user\n<tool_response>\n"
        '{"city": "Paris", "degrees": 22, "sky": "sunny"}\n</tool_response>\n<tool_response>\nnoon\n'
        "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert reply.usage.prompt_tokens == sum(len(model.tokenizer.encode(prompt)) for prompt in model.prompts)


def test_events_of_tools_come_in_their_order() -> None:
    stream = Reciter(f"Well.\n{CALL}", "Sunny.").stream_chat("?", tools=[get_weather], run_tools=True, thinking=False)
    kinds = [type(event) for event in stream]
    call = [CallStart, CallArguments, ToolCall]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [Text, *call, ToolResult, Text, Finish]


def test_errors_of_tools_go_back_to_the_model() -> None:
    def divide(a: float, b: float) -> float:
        """Divide."""
        return a / b

    calls = [
        '<tool_call>{"name": "divide", "arguments": {"a": 1, "b": 0}}</tool_call>',
        '<tool_call>{"name": "divide", "arguments": {"a": "one"}}</tool_call>',
        '<tool_call>{"name": "multiply", "arguments": {}}</tool_call>',
    ]
    model = Reciter(*calls, "I give up.")
    reply = model.chat("?", tools=[divide], run_tools=True, thinking=False)
    assert reply.text == "I give up."
    assert [json.loads(result.content)["error"] for result in reply.tool_results] == [
        "ZeroDivisionError: float division by zero",
        "divide needs the argument b",
        "there is no tool 'multiply'; the tools are divide",
    ]
    assert isinstance(reply.tool_results[0].error, ZeroDivisionError)
    assert 'ZeroDivisionError: float division by zero"}\n</tool_response>' in model.prompts[1]


def test_tools_are_run_for_max_steps_at_most() -> None:
    model = Reciter(*[CALL] * 9)
    reply = model.chat("?", tools=[get_weather], run_tools=True, max_steps=3, thinking=False)
    assert len(model.prompts) == 3
    assert reply.finish_reason == "tool_calls"
    assert len(reply.tool_results) == 2
    assert len({call.id for call in [*reply.tool_calls, *(result.call for result in reply.tool_results)]}) == 3
    assert reply.notices == ["stopped after 3 steps with calls left to run; raise max_steps"]


def test_calls_are_left_to_the_caller_if_one_of_them_has_no_function() -> None:
    reply = Reciter(f"{NOW}\n{CALL}").chat("?", tools=[now, SCHEMA], run_tools=True, thinking=False)
    assert reply.finish_reason == "tool_calls"
    assert [call.name for call in reply.tool_calls] == ["now", "get_weather"]
    assert reply.tool_results == []


def test_a_call_that_is_cut_off_is_not_run() -> None:
    model = Reciter(CALL)
    reply = model.chat("?", tools=[get_weather], run_tools=True, thinking=False, max_tokens=20)
    assert reply.finish_reason == "length"
    assert (reply.tool_calls, reply.tool_results) == ([], [])
    assert reply.text == ""
    assert [call.name for call in reply.unfinished_calls] == ["get_weather"]
    assert repr(reply) == "Reply('', unfinished_calls=['get_weather'], finish_reason='length')"


# --- leaving early ---


def test_a_stream_that_is_closed_keeps_complete_steps_and_text() -> None:
    stream = Reciter("<think>\nHm.\n</think>\n\nYes, it is.").stream_chat("?")
    for event in stream:
        if isinstance(event, Text):
            break
    stream.close()
    assert list(stream) == []
    assert stream.reply is None
    assert stream.messages == [{"role": "assistant", "content": stream.text, "reasoning_content": "Hm."}]
    with pytest.raises(OptionError, match="closed before its end"):
        stream.run()


@pytest.mark.parametrize(("steps", "kept"), [(1, 0), (2, 0), (3, 0), (4, 3), (5, 4)])
def test_a_call_without_its_result_is_not_kept(steps: int, kept: int) -> None:
    stream = Reciter(f"{CALL}{NOW}", "Yes.").stream_chat("?", tools=[get_weather, now], run_tools=True, thinking=False)
    while steps:  # call, call, result, result, text
        steps -= not isinstance(next(stream), CallStart | CallArguments)
    stream.close()
    assert len(stream.messages) == kept


def test_an_interrupt_in_a_tool_is_raised() -> None:
    def stop() -> None:
        """Stop."""
        raise KeyboardInterrupt

    stream = Reciter('<tool_call>{"name": "stop"}</tool_call>').stream_chat(
        "?", tools=[stop], run_tools=True, thinking=False
    )
    with pytest.raises(KeyboardInterrupt):
        stream.run()
    assert stream.messages == []


def test_thinking_can_be_ended_by_the_caller() -> None:
    model = Reciter("<think>\nOn and on and on")
    stream = model.stream_chat("?")
    next(stream)
    stream.end_thinking()
    reply = stream.run()
    assert reply.reasoning.endswith("directly now.")


def test_an_answer_whose_session_was_used_for_another_says_so() -> None:
    model = Reciter("One two three.", "Yes.")
    session = Session(model)
    first = model.stream_chat("Count.", session=session, thinking=False)
    next(first)
    assert model.chat("So?", session=session, thinking=False).text == "Yes."
    with pytest.raises(OptionError, match="the session was used for another answer, which ended this one"):
        first.run()
    assert first.messages == [{"role": "assistant", "content": first.text}]


def test_a_replys_messages_can_be_changed_without_effect() -> None:
    model = Reciter(CALL, "Sunny.")
    talk = model.conversation(tools=[SCHEMA], thinking=False)
    reply = talk.send("?")
    before = copy.deepcopy(talk.messages)
    reply.messages[0]["tool_calls"][0]["function"]["arguments"]["city"] = "Rome"
    reply.tool_calls[0].arguments.clear()
    talk.messages[0]["content"] = "!"
    assert talk.messages == before


def test_messages_that_do_not_fit_the_context_are_refused() -> None:
    with pytest.raises(ContextLengthError, match="the context is 50;"):
        Reciter(context=50).stream_chat("1 " * 60)
