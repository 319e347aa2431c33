"""Tool calls by the openai package: end to end with the example model, and the choices of tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city."}},
            "required": ["city"],
        },
        "strict": True,
    },
}
QUESTION: Any = {"role": "user", "content": "What is the weather in London?"}
OPTIONS: Any = {"model": "", "temperature": 0, "extra_body": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_model_calls_a_tool_and_puts_its_result_into_words(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(messages=[QUESTION], tools=[WEATHER], **OPTIONS)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "London"}
    assert call.id
    content = '{"city": "London", "degrees": 17, "sky": "foggy"}'
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": content}
    history = [QUESTION, choice.message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(messages=history, tools=[WEATHER], **OPTIONS)
    assert second.choices[0].message.content == "It is 17 degrees and foggy in London."
    assert second.choices[0].finish_reason == "stop"


def test_a_streamed_call_begins_with_its_name_and_goes_on_with_arguments_alone(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(messages=[QUESTION], tools=[WEATHER], stream=True, **OPTIONS))
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
    first, rest = pieces[0], pieces[1:]
    assert (first.index, first.type) == (0, "function")
    assert first.id
    assert first.function is not None
    assert first.function.name == "get_weather"
    arguments = first.function.arguments or ""
    for piece in rest:
        assert (piece.index, piece.id, piece.type) == (0, None, None)
        assert piece.function is not None
        assert piece.function.name is None
        arguments += piece.function.arguments or ""
    assert json.loads(arguments) == {"city": "London"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""


def test_the_clients_own_stream_helper_accumulates_the_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=[QUESTION], tools=[WEATHER], **OPTIONS) as stream:
        answer = stream.get_final_completion()
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert json.loads(calls[0].function.arguments) == {"city": "London"}


def test_tools_that_are_no_functions_are_left_out(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "web_search"}, {"type": "namespace", "name": "x", "tools": []}, WEATHER]
    answer = client.chat.completions.create(messages=[QUESTION], tools=tools, **OPTIONS)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_allowed_tools_are_the_only_ones_on_offer(client: openai.OpenAI) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    choice: Any = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_weather"}}]},
    }
    usage = [
        client.chat.completions.create(messages=[QUESTION], tools=tools, **OPTIONS, **more).usage
        for tools, more in (([WEATHER], {}), ([WEATHER, other], {"tool_choice": choice}), ([WEATHER, other], {}))
    ]
    lengths = [one.prompt_tokens for one in usage if one is not None]
    assert lengths[0] == lengths[1] < lengths[2]


def test_no_tool_is_called_with_the_choice_none(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=[QUESTION], tools=[WEATHER], tool_choice="none", max_tokens=100, **OPTIONS
    )
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_call_is_made_whatever_the_question(client: openai.OpenAI, choice: Any) -> None:
    question: Any = {"role": "user", "content": "What is 17 + 25?"}
    answer = client.chat.completions.create(messages=[question], tools=[WEATHER], tool_choice=choice, **OPTIONS)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert calls[0].function.name == "get_weather"
    assert set(json.loads(calls[0].function.arguments)) == {"city"}


def test_parallel_calls_can_be_forbidden(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=[QUESTION], tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, **OPTIONS
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "sometimes"}, "tool_choice is 'sometimes'; it must be one of auto, none, required"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "'x'; the tools are"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name is missing"),
        ({"tools": [WEATHER, WEATHER]}, "two tools are named get_weather"),
        ({"tools": {}}, "tools is {}; it must be a list"),
        ({"functions": [{}]}, "send tools"),
    ],
)
def test_what_makes_no_sense_is_refused(client: openai.OpenAI, fields: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(messages=[QUESTION], model="", extra_body=fields)
    assert words in error.value.message
