"""OpenAI's Responses API, by the openai package against a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import openai
import pydantic
import pytest
from reciter import Reciter
from scripted import Held
from serving import Runs, served, wait_until

import npqwen
from npqwen.server import app

QUESTION = "What is 17 + 25?"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
STRUCTURED = pytest.mark.skipif(find_spec("llguidance") is None, reason="structured output needs llguidance")


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@contextmanager
def reciting(*texts: str, kind: type[Reciter] = Reciter, **options: Any) -> Iterator[tuple[openai.OpenAI, Any]]:
    """A client of a server whose model says these texts, and the model."""
    model: Any = kind(*texts, **options)
    with served(app(model)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client, model


def test_an_answer_is_that_of_the_library(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    response = client.responses.create(model=tiny_model.name, input=QUESTION, temperature=0.01)
    reply = tiny_model.chat(QUESTION, temperature=0.01)
    assert response.output_text == reply.text
    reasoning, message = response.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == reply.reasoning
    assert message.type == "message"
    assert message.role == "assistant"
    assert response.status == "completed"
    assert response.model == tiny_model.name
    assert response.temperature == 0.01
    usage = response.usage
    assert usage is not None
    assert usage.input_tokens == tiny_model.count_tokens(QUESTION)
    assert usage.output_tokens == reply.usage.generated_tokens
    assert usage.output_tokens_details.reasoning_tokens == reply.reasoning_tokens
    counted = client.responses.input_tokens.count(model=tiny_model.name, input=QUESTION)
    assert counted.input_tokens == usage.input_tokens


def test_a_stream_is_the_same_response_in_pieces(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    options: Any = {"model": tiny_model.name, "input": QUESTION, "temperature": 0.01}
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"


def test_a_summary_streams_in_parts(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    options: Any = {"model": tiny_model.name, "input": QUESTION, "temperature": 0.01, "reasoning": {"summary": "auto"}}
    with client.responses.stream(**options) as stream:
        pieces = [event.delta for event in stream if event.type == "response.reasoning_summary_text.delta"]
        final = stream.get_final_response()
    assert final.output[0].type == "reasoning"
    assert "".join(pieces) == final.output[0].summary[0].text == tiny_model.chat(QUESTION, temperature=0.01).reasoning


def test_a_tool_is_called_and_its_result_read() -> None:
    with reciting(f"Let me look.\n{CALL}", "It is sunny.") as (client, model):
        asked: Any = [{"role": "user", "content": "The weather in Paris?"}]
        first = client.responses.create(model="m", input=asked, tools=[WEATHER])
        call = first.output[-1]
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
        asked += [item.model_dump() for item in first.output]
        asked += [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 21 degrees"}]
        second = client.responses.create(model="m", input=asked, tools=[WEATHER])
        assert second.output_text == "It is sunny."
        assert (
            f"{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\nsunny, 21 degrees\n</tool_response>"
            in model.prompts[1]
        )


def test_arguments_stream_as_they_are_written() -> None:
    with (
        reciting(CALL, kind=Held, at=22) as (client, model),
        client.responses.stream(model="m", input=QUESTION, tools=[WEATHER]) as stream,
    ):
        pieces = []
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                pieces.append(event.delta)
                model.go.set()  # the model writes the rest once a piece has come
        final = stream.get_final_response()
    assert len(pieces) >= 2
    assert "Paris" not in pieces[0]
    assert final.output[0].type == "function_call"
    assert json.loads(final.output[0].arguments) == json.loads("".join(pieces)) == {"city": "Paris"}


def test_a_parsed_call_has_the_arguments_of_the_tools_class() -> None:
    class GetWeather(pydantic.BaseModel):
        city: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    flat: Any = {"type": "function", **tool["function"]}
    with reciting(CALL) as (client, _):
        response = client.responses.parse(model="m", input=QUESTION, tools=[flat])
    call = response.output[0]
    assert call.type == "function_call"
    assert call.parsed_arguments == {"city": "Paris"}


def test_an_asynchronous_client_streams_too() -> None:
    async def text(url: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = await client.responses.create(model="m", input=QUESTION, stream=True)
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    model: Any = Reciter("It is 42.")
    with served(app(model)) as url:
        assert asyncio.run(text(url)) == "It is 42."


def test_errors_are_the_packages_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'x' is not served"):
        client.responses.create(model="x", input=QUESTION)
    with pytest.raises(openai.BadRequestError, match="send the whole conversation in input") as refused:
        client.responses.create(model="", input=QUESTION, previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"


def test_a_response_that_fails_says_so_in_its_last_event() -> None:
    with reciting() as (client, _):
        *_, last = client.responses.create(model="m", input=QUESTION, stream=True)
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"


def test_a_stream_that_is_closed_ends_the_request(runs: Runs) -> None:
    with reciting("word " * 500, context=16384) as (client, _):
        with client.responses.create(model="m", input=QUESTION, stream=True) as stream:
            next(iter(stream))
        wait_until(lambda: runs.newest.cancelled)


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    inhabitants: int


@STRUCTURED
@pytest.mark.parametrize("effort", ["none", "high"])
def test_an_answer_has_the_structure_of_a_class(client: openai.OpenAI, tiny_model: npqwen.Model, effort: Any) -> None:
    options: Any = {
        "model": tiny_model.name,
        "input": QUESTION,
        "max_output_tokens": 1000,
        "reasoning": {"effort": effort},
    }
    response = client.responses.parse(**options, text_format=City)
    assert isinstance(response.output_parsed, City)
    assert [item.type for item in response.output] == (["reasoning"] if effort == "high" else []) + ["message"]
    with client.responses.stream(**options, text_format=City) as stream:
        assert isinstance(stream.get_final_response().output_parsed, City)
    free = client.responses.create(**options, text={"format": {"type": "json_object"}})
    assert free.status == "incomplete" or isinstance(json.loads(free.output_text), dict)


@STRUCTURED
def test_a_call_can_be_demanded(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    other: Any = {**WEATHER, "name": "get_time"}
    choices: list[tuple[Any, set[str]]] = [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "name": "get_time"}, {"get_time"}),
    ]
    for choice, names in choices:
        response = client.responses.create(
            model=tiny_model.name,
            input=QUESTION,
            tools=[WEATHER, other],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_output_tokens=1000,
        )
        call = response.output[-1]
        assert call.type == "function_call"
        assert call.name in names
        assert json.loads(call.arguments).keys() == {"city"}
