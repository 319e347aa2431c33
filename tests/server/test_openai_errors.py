"""Errors of OpenAI's API: their shape, their statuses, and 300 mutated bodies without a single 500."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from asgi import call
from serving import ScriptedModels, scripted_server, wait_until

import npqwen
from npqwen.chat.events import Text
from npqwen.errors import ClosedError, OutOfMemoryError, QueueFullError
from npqwen.server import app
from npqwen.server.requests import Request
from npqwen.server.run import Run
from npqwen.server.worker import Worker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: Any = [{"role": "user", "content": "Hello"}]
AMBIGUOUS = "start: s\ns: s s | s s s | c\nc: /[a-z ]/"
BODIES = int(os.environ.get("NPQWEN_FUZZED_BODIES", "300"))


@pytest.fixture(scope="module")
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


@pytest.fixture
def scripted(tiny_model: npqwen.Model) -> Iterator[tuple[ScriptedModels, str]]:
    with scripted_server(tiny_model) as server:
        yield server


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in a body, whose shape is checked."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    assert "\n" not in body["error"]["message"]
    assert body["error"]["type"] == ("server_error" if response.status_code >= 500 else "invalid_request_error")
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": "Hello"}, "messages", "messages is 'Hello'; it must be a list"),
        ({"messages": [5]}, "messages[0]", "messages[0] is 5; it must be an object"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "messages[0].role is missing"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "must be one of system, developer"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "a part of type 'image_url'; the model reads text only",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "half a surrogate pair"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature", "temperature is 'hot'; it must be a number"),
        ({"messages": HELLO, "temperature": -1}, "temperature", "a number from 0 to 100"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens", "1 or more, or -1 for no limit"),
        ({"messages": HELLO, "n": 0}, "n", "a whole number from 1 to 16"),
        ({"messages": HELLO, "n": 2.5}, "n", "a whole number from 1 to 16"),
        ({"messages": HELLO, "stop": 5}, "stop", "text or a list of texts"),
        ({"messages": HELLO, "stop": 99 * ["a"]}, "stop", "at most 64"),
        ({"messages": HELLO, "stop": [""]}, "stop", "stop has ''"),
        ({"messages": HELLO, "logit_bias": {"a": 1}}, "logit_bias", "must be a token id"),
        ({"messages": HELLO, "logit_bias": {"1": 101}}, "logit_bias.1", "a number from -100 to 100"),
        ({"messages": HELLO, "logit_bias": {"99999": 1}}, None, "logit_bias has token id 99999"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"messages": HELLO, "stream": "yes"}, "stream", "true or false"),
        ({"messages": HELLO, "stream_options": True}, "stream_options", "an object"),
        ({"messages": HELLO, "seed": 2**70}, "seed", "a whole number"),
        ({"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type", "one of text, json_object"),
        ({"messages": HELLO, "guided_regex": "("}, "guided_regex", "guided_regex cannot be used"),
        ({"messages": HELLO, "guided_choice": []}, "guided_choice", "guided_choice is []"),
        ({"messages": HELLO, "grammar": "hello"}, "grammar", "grammar begins"),
        ({"messages": HELLO, "json_schema": {"type": "colour"}}, "json_schema", "json_schema cannot be used"),
        (
            {"messages": HELLO, "guided_grammar": "start: start"},
            "guided_grammar",
            "guided_grammar cannot be used: no text can have this structure",
        ),
        ({"messages": HELLO, "guided_json": {"const": 2**60}}, "guided_json", "guided_json has 1152921504606846976 as"),
        (
            {"messages": HELLO, "temperature": 1, "max_tokens": 300, "guided_grammar": AMBIGUOUS},
            "guided_grammar",
            "guided_grammar cannot be followed: a text can follow it in too many ways",
        ),
        ({"messages": HELLO, "reasoning_effort": "huge"}, "reasoning_effort", "one of none, minimal, low"),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, body: Any, param: str | None, words: str) -> None:
    response = http.post(CHAT, content=json.dumps(body))
    assert response.status_code == 400
    error = error_of(response)
    assert words in error["message"]
    assert error["param"] == param


def test_every_response_has_the_id_that_the_log_has(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    bodies = [{"messages": HELLO, "max_tokens": 1}, {"messages": HELLO, "max_tokens": 1, "stream": True}, {}]
    ids = []
    with caplog.at_level(logging.INFO, "npqwen.server.exchange"):
        for body in bodies:
            for given in ("", "abc-1", "a b", "x" * 129):
                ids.append(http.post(CHAT, json=body, headers={"X-Request-Id": given}).headers["x-request-id"])
                assert ids[-1] == given if given == "abc-1" else re.fullmatch(r"req_[0-9a-f]{24}", ids[-1])
        def ends() -> set[str]:
            return {record.message.rpartition(" s, ")[2] for record in caplog.records}

        wait_until(lambda: {*ids} <= {end.partition(": ")[0] for end in ends()})
    assert f"{ids[-1]}: messages is missing" in ends()
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        assert (client.models.list()._request_id or "").startswith("req_")
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve("gpt-4")
        assert error.value.request_id is not None



@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": NaN}', 100_000 * b"[", b'"a"'])
def test_what_is_no_json_object_is_refused(http: httpx.Client, path: str, body: bytes) -> None:
    response = http.post(path, content=body)
    assert response.status_code == 400
    assert error_of(response)["message"].startswith("the body is ")


def test_an_unknown_model_is_not_found(http: httpx.Client, tiny_model: npqwen.Model) -> None:
    for response in (
        http.post(CHAT, json={"model": "gpt-4", "messages": HELLO}),
        http.post(TEXT, json={"model": "gpt-4", "prompt": "a"}),
        http.get("/v1/models/gpt/4"),
    ):
        assert response.status_code == 404
        error = error_of(response)
        assert error["code"] == "model_not_found"
        assert tiny_model.name in error["message"]


def test_models_are_listed_with_their_context(http: httpx.Client, tiny_model: npqwen.Model) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["context_length"]) == (tiny_model.name, "model", tiny_model.context)
    assert http.get(f"/v1/models/{tiny_model.name}").json() == model
    assert listed["models"] == []


def test_aliases_are_listed_and_a_model_has_the_id_by_which_it_is_requested(tiny_model: npqwen.Model) -> None:
    served = app(tiny_model, aliases={"gpt-4o": tiny_model.name, "claude-*": tiny_model.name})
    listed = call(served, "GET", "/v1/models").json["data"]
    assert [model["id"] for model in listed] == [tiny_model.name, "gpt-4o"]
    assert listed[1] == {**listed[0], "id": "gpt-4o"}
    tags = call(served, "GET", "/api/tags").json["models"]
    assert [(tag["name"], tag["model"]) for tag in tags] == [(name, name) for name in (tiny_model.name, "gpt-4o")]
    for name in ("gpt-4o", "claude-5", "Tiny-Qwen3-16:latest"):
        assert call(served, "GET", f"/v1/models/{name}").json == {**listed[0], "id": name}
        assert call(served, "GET", f"/v1/models/{name}", {"anthropic-version": "2023-06-01"}).json["id"] == name


def test_every_route_is_there_without_v1_too(http: httpx.Client) -> None:
    assert http.get("/models").json() == http.get("/v1/models").json()
    assert http.post("/chat/completions", json={"messages": HELLO, "max_tokens": 1}).status_code == 200
    assert http.post("/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/images/generations", 404),
        ("POST", "/v1", 404),
    ],
)
def test_unknown_routes_have_an_error_of_the_same_shape(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert path in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/embeddings", {"input": "a"}, "is not an embedding model"),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, "is not a reranker"),
    ],
)
def test_other_tasks_are_refused_in_words(http: httpx.Client, path: str, body: dict[str, Any], message: str) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (QueueFullError("too many requests are waiting", 7), 503, "queue_full", "7"),
        (OutOfMemoryError("too little memory"), 503, "out_of_memory", "30"),
        (ClosedError("the server is shutting down"), 503, "closed", "5"),
        (ZeroDivisionError("secret"), 500, "internal_error", None),
    ],
)
def test_errors_of_the_server_have_their_status(
    scripted: tuple[ScriptedModels, str], error: Exception, status: int, code: str, retry: str | None
) -> None:
    models, url = scripted
    models.error = error
    for path, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "a"})):
        response = httpx.post(url + path, json=body)
        assert response.status_code == status
        assert error_of(response)["code"] == code
        assert "secret" not in response.text
        assert response.headers.get("Retry-After") == retry
        assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_error_in_the_middle_of_a_stream_reaches_the_client_as_one(
    scripted: tuple[ScriptedModels, str], path: str
) -> None:
    models, url = scripted
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chunks: Any
        if path == CHAT:
            chunks = client.chat.completions.create(model="", messages=HELLO, stream=True)
        else:
            chunks = client.completions.create(model="", prompt="a", stream=True)
        next(chunks)
        models.put(Text("Hel"))
        piece = next(chunks).choices[0]
        assert (piece.delta.content if path == CHAT else piece.text) == "Hel"
        models.put(ClosedError("the server is shutting down"))
        with pytest.raises(openai.APIError, match="shutting down") as error:
            next(chunks)
        assert error.value.code == "closed"


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7.5, -0.0, 1e308, 10**30, "", "a", "\x00", "\ud800", "😀" * 50, "<|im_end|>",
    "</think>", "none", "auto", "function", "text", [], {}, [None], [[]], [{}], {"a": {}}, ["a", 1], {"type": "text"},
    {"type": "function"}, {"type": "json_schema"}, [[[[[[]]]]]], {"": ""}, {"1": 1}, {"enable_thinking": False},
]  # fmt: skip
SEEDS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {
        "model": "", "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": None, "reasoning_content": "a", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "b"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        "tool_choice": "auto", "parallel_tool_calls": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 1,
        "max_tokens": 4, "n": 1, "stop": ["x"], "logit_bias": {"5": 1}, "logprobs": True, "top_logprobs": 1,
        "reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}, "metadata": {"a": "b"},
    }),
    (CHAT, {
        "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 4,
        "n": 2, "thinking": {"type": "enabled", "budget_tokens": 1}, "reasoning": {"effort": "low"},
        "reasoning_format": "none", "presence_penalty": 1, "frequency_penalty": 1, "min_p": 0.1,
        "repetition_penalty": 1.1, "return_progress": True, "response_format": {"type": "text"},
    }),
    (TEXT, {
        "prompt": ["a", "b"], "max_tokens": 3, "n": 2, "best_of": 2, "logprobs": 2, "echo": False, "suffix": "c",
        "seed": 1, "stop": "x", "temperature": 0, "stream": False, "user": "me",
    }),
    (CHAT, {
        "messages": HELLO, "max_tokens": 4, "reasoning_effort": "none", "stream": True, "response_format": {
            "type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {
                "type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"],
                "additionalProperties": False,
            }},
        },
    }),
    (CHAT, {
        "messages": HELLO, "max_tokens": 4, "enable_thinking": False, "tool_choice": "required", "tools": [{
            "type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
                "a": {"type": "string", "enum": ["b"]}}}},
        }],
    }),
    (CHAT, {"messages": HELLO, "max_tokens": 4, "enable_thinking": False, "guided_regex": "a+|(b[c-e])"}),
    (TEXT, {"prompt": "a", "max_tokens": 3, "guided_choice": ["a", "b"]}),
    (TEXT, {"prompt": "a", "max_tokens": 3, "grammar": 'root ::= "a" | "b"'}),
    (TEXT, {"prompt": [[1, 2], [3]], "max_tokens": 3, "echo": True, "stream": True, "stream_options": {}}),
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    inner = [pair for _, item in items if isinstance(item, dict | list) for pair in places(item)]
    return [(value, key) for key, _ in items] + inner


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A path, and a body with one to three changes."""
    path, body = copy.deepcopy(rng.choice(SEEDS))
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(body) or [(body, "messages")])
        change = rng.random()
        if change < 0.7:
            container[key] = copy.deepcopy(rng.choice(NASTY))
        elif change < 0.85:
            del container[key]
        elif isinstance(container, dict):
            other = rng.choice(SEEDS)[1]
            container[rng.choice(list(other))] = copy.deepcopy(rng.choice(list(other.values())))
        else:
            container *= rng.randint(2, 8)
    data = json.dumps(body).encode()
    if rng.random() < 0.1:
        at = rng.randrange(len(data))
        data = data[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(0, 3))) + data[at + 1 :]
    return path, data


def check_answer(response: httpx.Response) -> None:
    """Whether a response of the status 200 is an answer, in one piece or a stream."""
    if "event-stream" not in response.headers["content-type"]:
        answers = [response.json()]
        assert all(choice["finish_reason"] in ("stop", "length", "tool_calls") for choice in answers[0]["choices"])
    else:
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert events[-1] == "[DONE]" or "error" in json.loads(events[-1])
        answers = [json.loads(event) for event in events[:-1]]
        assert "internal error" not in events[-1]
    assert {answer["object"] for answer in answers} <= {"chat.completion", "chat.completion.chunk", "text_completion"}


@pytest.mark.filterwarnings("ignore::npqwen.SamplingWarning")
def test_mutated_bodies_are_answered_or_refused(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Worker.start

    async def short(self: Worker, request: Request, **how: Any) -> Run:
        options: Any = {**request.options, "max_tokens": min(request.options.get("max_tokens") or 4, 4)}
        return await start(self, replace(request, options=options), **how)

    monkeypatch.setattr(Worker, "start", short)
    rng = random.Random(16)
    statuses: dict[int, int] = {}
    for _ in range(BODIES):
        path, body = mutated(rng)
        response = http.post(path, content=body)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        try:
            if response.status_code == 200:
                check_answer(response)
            else:
                assert 400 <= response.status_code < 500
                error_of(response)
        except Exception as error:
            raise AssertionError(f"{path} {body!r}: {response.status_code} {response.text[:500]}") from error
    assert min(statuses[200], statuses[400]) > BODIES / 10
