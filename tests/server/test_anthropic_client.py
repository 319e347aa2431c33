"""Anthropic's Messages API, by the anthropic package against a server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import anthropic
import pydantic
import pytest
from reciter import Reciter
from scripted import Held
from serving import Runs, served, wait_until

import npqwen
from npqwen.server import app

SUM: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
STRUCTURED = pytest.mark.skipif(find_spec("llguidance") is None, reason="structured output needs llguidance")


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server, api_key="none", max_retries=0) as client:
        yield client


@contextmanager
def reciting(*texts: str, kind: type[Reciter] = Reciter, **options: Any) -> Iterator[tuple[anthropic.Anthropic, Any]]:
    """A client of a server whose model says these texts, and the model."""
    model: Any = kind(*texts, **options)
    with served(app(model)) as url, anthropic.Anthropic(base_url=url, auth_token="none", max_retries=0) as client:
        yield client, model


def test_an_answer_is_that_of_the_library(client: anthropic.Anthropic, tiny_model: npqwen.Model) -> None:
    options: Any = {"model": tiny_model.name, "max_tokens": 500, "messages": SUM, "extra_body": {"temperature": 0.01}}
    message = client.messages.create(**options, thinking={"type": "adaptive"})
    reply = tiny_model.chat(SUM, temperature=0.01, max_tokens=500)
    thought, text = message.content
    assert thought.type == "thinking"
    assert thought.thinking == reply.reasoning
    assert text.type == "text"
    assert text.text == reply.text
    assert message.role == "assistant"
    assert message.model == tiny_model.name
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == reply.usage.generated_tokens
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == reply.usage.prompt_tokens
    assert message._request_id is not None
    assert message._request_id.startswith("req_")
    plain = client.messages.create(**options)
    assert [block.type for block in plain.content] == ["text"]


def test_a_stream_is_the_same_message_in_pieces(client: anthropic.Anthropic, tiny_model: npqwen.Model) -> None:
    options: Any = {"model": tiny_model.name, "max_tokens": 500, "messages": SUM, "extra_body": {"temperature": 0.01}}
    options |= {"thinking": {"type": "enabled", "budget_tokens": 400}}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.to_dict()["content"] == whole.to_dict()["content"]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert {"thinking", "text", "signature"} <= set(kinds)


def test_tokens_are_counted(client: anthropic.Anthropic, tiny_model: npqwen.Model) -> None:
    counted = client.messages.count_tokens(model=tiny_model.name, messages=SUM, system="Be brief.", tools=[WEATHER])
    run = client.messages.create(model=tiny_model.name, max_tokens=1, messages=SUM, system="Be brief.", tools=[WEATHER])
    assert counted.input_tokens == run.usage.input_tokens + (run.usage.cache_read_input_tokens or 0)


def test_a_tool_is_called_and_its_result_read() -> None:
    with reciting(f"Let me look.\n{CALL}", "It is sunny.") as (client, model):
        asked: list[Any] = [{"role": "user", "content": "The weather in Paris?"}]
        first = client.messages.create(model="m", max_tokens=100, messages=asked, tools=[WEATHER])
        call = first.content[-1]
        assert call.type == "tool_use"
        assert (call.name, call.input) == ("get_weather", {"city": "Paris"})
        assert first.stop_reason == "tool_use"
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 21 degrees"}
        asked += [first.to_param(), {"role": "user", "content": [result]}]
        second = client.messages.create(model="m", max_tokens=100, messages=asked, tools=[WEATHER])
        assert second.content[0].type == "text"
        assert second.content[0].text == "It is sunny."
        assert (
            f"{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\nsunny, 21 degrees\n</tool_response>"
            in model.prompts[1]
        )


def test_arguments_stream_as_they_are_written() -> None:
    with (
        reciting(CALL, kind=Held, at=22) as (client, model),
        client.messages.stream(model="m", max_tokens=100, messages=SUM, tools=[WEATHER]) as stream,
    ):
        pieces = []
        for event in stream:
            if event.type == "input_json":
                pieces.append(event.partial_json)
                model.go.set()  # the model writes the rest once a piece has come
        final = stream.get_final_message()
    assert len(pieces) >= 2
    assert "Paris" not in pieces[0]
    assert final.content[0].type == "tool_use"
    assert final.content[0].input == {"city": "Paris"}


def test_the_tool_runner_of_the_package_runs_a_whole_turn() -> None:
    cities = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: Its name.
        """
        cities.append(city)
        return "sunny"

    with reciting(CALL, "It is sunny.") as (client, _):
        final = client.beta.messages.tool_runner(
            model="m", max_tokens=100, messages=SUM, tools=[get_weather]
        ).until_done()
    assert cities == ["Paris"]
    assert final.content[0].type == "text"
    assert final.content[0].text == "It is sunny."


def test_an_asynchronous_client_streams_too() -> None:
    async def text(url: str) -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=url, api_key="none") as client,
            client.messages.stream(model="m", max_tokens=100, messages=SUM) as stream,
        ):
            return "".join([piece async for piece in stream.text_stream])

    model: Any = Reciter("It is 42.")
    with served(app(model)) as url:
        assert asyncio.run(text(url)) == "It is 42."


def test_errors_are_the_packages_own_exceptions(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="model 'x' is not served") as missing:
        client.messages.create(model="x", max_tokens=100, messages=SUM)
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match=r"top_p is 7"):
        client.messages.create(model="", max_tokens=100, messages=SUM, extra_body={"top_p": 7})


def test_an_error_in_the_middle_of_a_stream_is_raised() -> None:
    with (
        reciting() as (client, _),
        pytest.raises(anthropic.APIStatusError, match="internal error") as error,
        client.messages.stream(model="m", max_tokens=100, messages=SUM) as stream,
    ):
        stream.until_done()
    assert error.value.type == "api_error"


def test_a_stream_that_is_closed_ends_the_request(runs: Runs) -> None:
    with reciting("word " * 500, context=16384) as (client, _):
        with client.messages.stream(model="m", max_tokens=1000, messages=SUM) as stream:
            next(iter(stream))
        wait_until(lambda: runs.newest.cancelled)


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    inhabitants: int


@STRUCTURED
@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "enabled", "budget_tokens": 20}])
def test_an_answer_has_the_structure_of_a_class(
    client: anthropic.Anthropic, tiny_model: npqwen.Model, thinking: Any
) -> None:
    options: Any = {"model": tiny_model.name, "max_tokens": 400, "messages": SUM, "thinking": thinking}
    message = client.messages.parse(**options, output_format=City)
    assert isinstance(message.parsed_output, City)
    with client.messages.stream(**options, output_format=City) as stream:
        assert isinstance(stream.get_final_message().parsed_output, City)


@STRUCTURED
def test_a_call_can_be_demanded(client: anthropic.Anthropic, tiny_model: npqwen.Model) -> None:
    other: Any = {**WEATHER, "name": "get_time"}
    choices: list[tuple[Any, set[str]]] = [
        ({"type": "any", "disable_parallel_tool_use": True}, {"get_weather", "get_time"}),
        ({"type": "tool", "name": "get_time"}, {"get_time"}),
    ]
    for choice, names in choices:
        message = client.messages.create(
            model=tiny_model.name, max_tokens=400, messages=SUM, tools=[WEATHER, other], tool_choice=choice
        )
        call = message.content[-1]
        assert call.type == "tool_use"
        assert call.name in names
        assert call.input.keys() == {"city"}
        assert message.stop_reason == "tool_use"


@STRUCTURED
def test_calls_can_be_ruled_out() -> None:
    with reciting("No call.") as (client, _):
        message = client.messages.create(
            model="m", max_tokens=100, messages=SUM, tools=[WEATHER], tool_choice={"type": "none"}
        )
    assert [block.type for block in message.content] == ["text"]


def test_the_models_are_listed(client: anthropic.Anthropic, tiny_model: npqwen.Model) -> None:
    page = client.models.list()
    (model,) = page.data
    assert (page.has_more, page.first_id, page.last_id) == (False, tiny_model.name, tiny_model.name)
    assert [each.id for each in client.models.list()] == [tiny_model.name]
    assert (model.type, model.id, model.display_name) == ("model", tiny_model.name, tiny_model.name)
    assert model.created_at.timestamp() == int((tiny_model.path / "config.json").stat().st_mtime)
    assert model.max_input_tokens == tiny_model.context
    assert client.models.retrieve(tiny_model.name) == model
    with pytest.raises(anthropic.NotFoundError, match="there is only") as error:
        client.models.retrieve("gpt-4")
    assert isinstance(error.value.body, dict)
    assert error.value.body["error"]["type"] == "not_found_error"
