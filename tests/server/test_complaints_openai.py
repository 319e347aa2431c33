"""What users of other servers complain about, and what holds here instead, for OpenAI's API."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from reciter import Reciter
from serving import Runs, ScriptedModels, scripted_server, served, wait_until

import npqwen
from npqwen.chat.events import CallArguments, CallStart, Event, Text
from npqwen.server import app, streaming
from npqwen.server.run import Progress

SUM: Any = [{"role": "user", "content": "What is 17 + 25?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def scripted(tiny_model: npqwen.Model) -> Iterator[tuple[ScriptedModels, openai.OpenAI]]:
    with (
        scripted_server(tiny_model) as (models, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield models, client


# 4: generation continues after the client leaves (see test_openai_vanishing.py, too)


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_prompt_is_given_up_in_the_middle_when_its_client_leaves(
    large: Path, runs: Runs, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    with npqwen.load(large, threads=1) as model:
        forward = model.forward_pieces

        def counted(pieces: Any, *args: Any) -> Any:
            computed.append(sum(len(piece.ids) for piece in pieces))
            return forward(pieces, *args)

        monkeypatch.setattr(model, "forward_pieces", counted)
        with served(app(model)) as url:
            host, port = url.removeprefix("http://").split(":")
            body = json.dumps({"prompt": [n % 4000 for n in range(8000)], "stream": stream}).encode()
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                wait_until(lambda: computed)
            wait_until(lambda: runs.newest.cancelled)
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 1}, timeout=60)
            assert answer.status_code == 200
    assert 0 < sum(computed) < 8000


# 5, 6, 7: JSON lands in the reasoning; thinking off drops the schema; a schema switches thinking off


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_json_of_the_schema_is_in_the_content_and_thinking_stays_as_it_was(
    client: openai.OpenAI, thinking: bool, stream: bool
) -> None:
    options: Any = {"seed": 1, "response_format": FORMAT, "extra_body": {"enable_thinking": thinking}}
    answer: Any = client.chat.completions.create(model="", messages=SUM, stream=stream, **options)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in answer]
        content = "".join(delta.content or "" for delta in deltas)
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    else:
        content = answer.choices[0].message.content
        reasoning = getattr(answer.choices[0].message, "reasoning_content", "")
    assert isinstance(json.loads(content)["sum"], int)
    assert bool(reasoning) == thinking
    assert "{" not in reasoning


# 8: the prompt is silently cut


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(
    client: openai.OpenAI, tiny_model: npqwen.Model, stream: bool
) -> None:
    messages: Any = [{"role": "user", "content": 3000 * "one "}]
    count = tiny_model.count_tokens(messages)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="", messages=messages, stream=stream)
    assert error.value.code == "context_length_exceeded"
    assert f"{count:,} tokens, and the context is {tiny_model.context:,}" in error.value.message
    with pytest.raises(openai.BadRequestError, match="and the context is 2,048") as error:
        client.completions.create(model="", prompt=3000 * "one ", stream=stream)
    assert error.value.code == "context_length_exceeded"


# 9: a long prompt makes the client give up


def test_a_stream_is_never_silent_while_the_prompt_is_read(
    scripted: tuple[ScriptedModels, openai.OpenAI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "KEEPALIVE", 0.02)
    models, client = scripted
    chunks = client.chat.completions.create(model="", messages=SUM, stream=True, extra_body={"return_progress": True})
    first = next(chunks)
    assert first.choices[0].delta.role == "assistant"
    for _ in range(3):  # nothing is known yet
        chunk = next(chunks)
        assert (chunk.choices[0].index, chunk.choices[0].finish_reason) == (0, None)
        assert not chunk.choices[0].delta.content
    models.put(Progress(300, 1000, 100))
    while "prompt_progress" not in (chunk.model_extra or {}):
        chunk = next(chunks)
    progress = chunk.model_extra["prompt_progress"]  # type: ignore[index]
    assert (progress["processed"], progress["total"], progress["cache"]) == (300, 1000, 100)
    models.put(Text("42"))
    while not chunk.choices[0].delta.content:
        chunk = next(chunks)
    assert chunk.choices[0].delta.content == "42"
    chunks.close()


# 11: silence while a long tool call is buffered


def test_a_call_is_streamed_while_it_is_written(scripted: tuple[ScriptedModels, openai.OpenAI]) -> None:
    models, client = scripted
    chunks = client.chat.completions.create(model="", messages=SUM, stream=True)
    next(chunks)
    models.put(CallStart(0, "call_1", "write"))
    start = next(chunks).choices[0].delta.tool_calls
    assert start is not None
    assert start[0].function is not None
    assert (start[0].id, start[0].function.name, start[0].function.arguments) == ("call_1", "write", "")
    for piece in ('{"text": "', "a", "b"):
        models.put(CallArguments(0, piece))
        more = next(chunks).choices[0].delta.tool_calls
        assert more is not None
        assert more[0].function is not None
        assert (more[0].id, more[0].function.name, more[0].function.arguments) == (None, None, piece)
    chunks.close()


# 12, 14: what is unknown makes the server answer 400


def test_unknown_fields_are_tolerated_and_logged(client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"context_management": {"edits": []}, "output_config": {"effort": "high"}, "store": True, "user": "me"}
    fields["chat_template_kwargs"] = {"colour": 1}
    with caplog.at_level(logging.INFO, "npqwen.server.exchange"):
        answer = client.chat.completions.create(model="", messages=SUM, max_tokens=2, extra_body=fields)
        ignored = " s, ignored context_management, output_config, chat_template_kwargs.colour, req_"
        wait_until(lambda: any(ignored in record.message for record in caplog.records))
    assert answer.choices


# 16, 17: tool calls leak into the content of a stream

CALLS = {
    "hybrid": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>',
    "coder": "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
    "</function>\n</tool_call>",
}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


@pytest.mark.parametrize("template", CALLS)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("end", ["", "broken off"])
@pytest.mark.parametrize("shown", ["apart", "inline"])
def test_a_stream_gives_the_message_that_an_answer_in_one_piece_has(
    scripted: tuple[ScriptedModels, openai.OpenAI], template: str, count: int, end: str, shown: str
) -> None:
    thought = "<think>\nI add.\n</think>\n\n" if template == "hybrid" else ""
    text = thought + "\n".join(["Let me see.", *(count * [CALLS[template]])])
    if end:
        text += "\n" + CALLS[template][:-30]
    model = Reciter(text, template=template)
    limit = None if not end else len(model.tokenizer.encode(text))
    events: list[Event] = list(model.stream_chat(SUM, tools=[ADD], max_tokens=limit))
    models, client = scripted
    extra: Any = {"tools": [ADD], "extra_body": {"reasoning_format": "none" if shown == "inline" else "deepseek"}}

    def answer(stream: bool) -> Any:
        models.script = events
        return client.chat.completions.create(model="", messages=SUM, stream=stream, **extra)

    whole = answer(False).choices[0]
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}}
    for chunk in answer(True):
        (choice,) = chunk.choices
        found["content"] += choice.delta.content or ""
        found["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            one = found["calls"].setdefault(call.index, ["", "", ""])
            one[0] += call.id or ""
            one[1] += call.function.name or ""
            one[2] += call.function.arguments or ""
        found["finish_reason"] = choice.finish_reason
    assert found["content"] == (whole.message.content or "")
    assert found["reasoning"] == (getattr(whole.message, "reasoning_content", None) or "")
    assert found["finish_reason"] == whole.finish_reason
    calls = whole.message.tool_calls or []
    assert [(id, name) for id, name, _ in found["calls"].values()] == [(call.id, call.function.name) for call in calls]
    for (_, _, arguments), call in zip(found["calls"].values(), calls, strict=True):
        assert arguments == call.function.arguments or json.loads(arguments) == json.loads(call.function.arguments)
    assert "<tool_call>" not in found["content"]
    assert "<function" not in found["content"]
    assert len(calls) >= count
    assert [json.loads(call.function.arguments) for call in calls[:count]] == count * [{"a": 1, "b": 2}]


# 22: knobs that do nothing


def test_a_budget_of_thinking_is_enforced(client: openai.OpenAI) -> None:
    usages = [
        client.chat.completions.create(model="", messages=SUM, seed=1, max_tokens=150, extra_body=fields).usage
        for fields in (
            {},
            {"thinking_budget": 5},
            {"reasoning": {"max_tokens": 5}},
            {"thinking": {"type": "enabled", "budget_tokens": 5}},
        )
    ]
    lengths = [usage.completion_tokens_details.reasoning_tokens for usage in usages]  # type: ignore[union-attr]
    assert lengths[0] > 20  # type: ignore[operator]
    ending = lengths[1] - 5  # type: ignore[operator]
    assert 0 <= ending < 60, "the sentence that ends the thinking"
    assert lengths[1:] == 3 * [5 + ending]


def test_an_effort_is_a_budget(scripted: tuple[ScriptedModels, openai.OpenAI]) -> None:
    models, client = scripted
    efforts: list[tuple[Any, int | None]] = [("low", 1024), ("medium", 4096), ("high", 16384), ("xhigh", None)]
    for effort, budget in efforts:
        client.chat.completions.create(model="", messages=SUM, stream=True, reasoning_effort=effort).close()
        assert models.requests[-1].options.get("thinking_budget") == budget
        assert "thinking" not in models.requests[-1].options


@pytest.mark.parametrize(
    "field",
    [
        {"best_of": 2},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {}},
        {"verbosity": "high"},
        {"mirostat": 2},
        {"min_tokens": 5},
        {"ignore_eos": True},
        {"stop_token_ids": [5]},
        {"echo": True},
    ],
)
def test_what_cannot_be_obeyed_is_refused(client: openai.OpenAI, field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(openai.BadRequestError, match=f"{name} is not supported") as error:
        client.chat.completions.create(model="", messages=SUM, extra_body=field)
    assert error.value.param == name


def test_what_changes_nothing_is_accepted(client: openai.OpenAI) -> None:
    fields = {
        "best_of": 1, "modalities": ["text"], "verbosity": "medium", "mirostat": 0, "min_tokens": 0, "typical_p": 1.0,
        "ignore_eos": False, "stop_token_ids": [], "xtc_probability": 0, "functions": [], "function_call": "none",
        "max_tokens": 2, "seed": -1, "top_k": -1, "service_tier": "auto", "prompt_cache_key": "a", "prediction": None,
    }  # fmt: skip
    assert client.chat.completions.create(model="", messages=SUM, extra_body=fields).choices
