"""Resumable streams: a client that lost its connection gets the events that it missed, and the rest."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest
from asgi import call, post
from serving import Runs, ScriptedModels, scripted_server, served, wait_until

import npqwen
from npqwen.chat.events import Text
from npqwen.server import app, recording

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
RESUMABLE = {"X-Resumable": "true"}
SOME = {"temperature": 0, "max_tokens": 30, "seed": 1}
ENDLESS = {"logit_bias": {"4096": -100, "4098": -100}, "temperature": 1.5, "seed": 1}
"""Keeps the example model from ending its text before the context is full."""
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": HELLO | SOME,
    "/v1/completions": {"prompt": "Hello", "stream": True} | SOME,
    "/v1/responses": {"input": "Hello", "stream": True, "temperature": 0, "max_output_tokens": 30},
    "/v1/messages": HELLO | {"max_tokens": 30, "temperature": 0},
}


@pytest.fixture
def scripted(tiny_model: npqwen.Model) -> Iterator[tuple[ScriptedModels, str]]:
    with scripted_server(tiny_model) as server:
        yield server


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PACE", 0.01)


@contextmanager
def begun(url: str, path: str = "/v1/chat/completions", **options: Any) -> Iterator[tuple[str, Iterator[str]]]:
    """A resumable stream: its id, and its lines."""
    body, headers = options.get("body", HELLO), RESUMABLE | options.get("headers", {})
    with httpx.stream("POST", url + path, json=body, headers=headers, timeout=30) as response:
        assert response.status_code == 200
        yield response.headers["x-stream-id"], response.iter_lines()


def read_until(lines: Iterator[str], text: str) -> list[str]:
    """The lines up to the first one that has this text."""
    read = []
    for line in lines:
        read.append(line)
        if text in line:
            return read
    raise AssertionError(f"{text} did not come: {read}")


def numbers(lines: list[str]) -> list[int]:
    return [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")]


def without_ids(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("id: ")]


def said(lines: list[str]) -> str:
    """The text of a chat's chunks."""
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join([chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]])


def again(url: str, id: str, number: int = 0, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.get(f"{url}/v1/streams/{id}?from={number}", headers=headers, timeout=30)


def finish(model: npqwen.Model) -> Any:
    """The last event of a chat."""
    return list(model.stream_chat("Hello", temperature=0, max_tokens=1, thinking=False))[-1]


def test_what_was_missed_and_the_rest_follow_when_a_client_comes_back(
    scripted: tuple[ScriptedModels, str], tiny_model: npqwen.Model
) -> None:
    models, url = scripted
    with begun(url) as (id, lines):
        models.put(Text("one"))
        seen = read_until(lines, "one")
    models.put(Text(" two"))
    last = numbers(seen)[-1]
    with httpx.stream("GET", f"{url}/v1/streams/{id}?from={last + 1}", timeout=30) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        missed = read_until(lines, "two")
        models.put(Text(" three"), finish(tiny_model))
        rest = [*missed, *lines]
    assert said(seen) == "one"
    assert said(rest) == " two three"
    assert rest[-2] == "data: [DONE]"
    assert numbers(seen + rest) == list(range(numbers(rest)[-1] + 1))
    assert not models.runs[-1].cancelled


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_read_in_two_parts_is_the_stream_read_at_once(server: str, path: str) -> None:
    with begun(server, path, body=BODIES[path]) as (id, lines):
        at_once = list(lines)
    first, *_, last = numbers(at_once)
    assert first == 0
    for number in (0, last // 2, last):
        part = again(server, id, number).text.splitlines()
        at = at_once.index(f"id: {number}")
        assert part == at_once[at:]


def test_lines_of_json_are_resumed_by_their_number(server: str) -> None:
    body = {"model": "", "messages": HELLO["messages"], "options": {"temperature": 0, "num_predict": 20}}
    with begun(server, "/api/chat", body=body) as (id, lines):
        at_once = [line for line in lines if line]
    assert not numbers(at_once)
    assert json.loads(at_once[-1])["done"]
    response = again(server, id, 1)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.splitlines() == at_once[1:]


def test_a_browser_goes_on_after_the_last_event_that_it_has(server: str) -> None:
    with begun(server, body=BODIES["/v1/chat/completions"]) as (id, lines):
        at_once = list(lines)
    response = again(server, id, headers={"Last-Event-ID": "2"})
    assert numbers(response.text.splitlines()) == numbers(at_once)[3:]
    last = numbers(at_once)[-1]
    assert again(server, id, headers={"Last-Event-ID": str(last)}).status_code == 204
    assert again(server, id, last + 1).status_code == 204


def test_several_clients_follow_one_stream(scripted: tuple[ScriptedModels, str], tiny_model: npqwen.Model) -> None:
    models, url = scripted
    with begun(url) as (id, lines), httpx.stream("GET", f"{url}/v1/streams/{id}", timeout=30) as second:
        others = second.iter_lines()
        models.put(Text("one"))
        read_until(lines, "one")
        read_until(others, "one")
        models.put(Text(" two"), finish(tiny_model))
        assert said(list(lines)) == said(list(others)) == " two"


def test_only_a_stream_that_was_asked_for_outlives_its_client(
    scripted: tuple[ScriptedModels, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, url = scripted
    for headers in ({}, {"X-Resumable": "false"}):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=HELLO, headers=headers) as response:
            assert "x-stream-id" not in response.headers
            models.put(Text("one"))
            assert not numbers(read_until(response.iter_lines(), "one"))
        wait_until(lambda: models.runs[-1].cancelled)


def test_an_answer_ends_when_nobody_comes_back(
    server: str, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SECONDS", 0.2)
    with begun(server, body=HELLO | ENDLESS) as (id, lines):
        next(lines)
    wait_until(lambda: runs.newest.cancelled)
    assert again(server, id).status_code == 404


def test_an_answer_is_not_ended_while_somebody_follows(
    scripted: tuple[ScriptedModels, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SECONDS", 2.0)
    models, url = scripted
    with begun(url) as (id, lines):
        next(lines)
    with httpx.stream("GET", f"{url}/v1/streams/{id}", timeout=30) as response:
        lines = response.iter_lines()  # the connection is closed when it is collected
        next(lines)
        with begun(url) as (_, others):
            next(others)
        wait_until(lambda: models.runs[1].cancelled)  # of a stream that was left after the first one
        assert not models.runs[0].cancelled


def test_a_stream_is_ended_by_its_client(server: str, runs: Runs) -> None:
    with begun(server, body=HELLO | ENDLESS) as (id, lines):
        next(lines)
        assert httpx.delete(f"{server}/v1/streams/{id}").status_code == 204
        wait_until(lambda: runs.newest.cancelled)
        list(lines)  # it ends
    assert again(server, id).status_code == 404
    assert httpx.delete(f"{server}/v1/streams/{id}").status_code == 404


def test_the_slot_of_an_abandoned_answer_is_free_for_others(
    tiny_model: npqwen.Model, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SECONDS", 0.2)
    with served(app(tiny_model, parallel=1)) as url:
        with begun(url, body=HELLO | ENDLESS) as (_, lines):
            next(lines)
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Hello", "max_tokens": 2}, timeout=30)
    assert answer.status_code == 200
    assert runs.all[0].cancelled


def test_what_does_not_stream_is_as_without_the_header(tiny_model: npqwen.Model, runs: Runs) -> None:
    application = app(tiny_model)
    body = {"messages": HELLO["messages"], "max_tokens": 2}
    reply = post(application, "/v1/chat/completions", body, RESUMABLE)
    assert (reply.status, "x-stream-id" in reply.headers) == (200, False)
    assert reply.json["choices"][0]["finish_reason"] == "length"
    assert post(application, "/v1/chat/completions", {}, RESUMABLE).json["error"]["param"] == "messages"
    assert call(application, "GET", "/health", RESUMABLE).status == 200


@pytest.mark.parametrize(("value", "status"), [("yes", 400), ("TRUE", 200), ("False", 200)])
def test_the_header_is_true_or_false(tiny_model: npqwen.Model, value: str, status: int) -> None:
    reply = post(app(tiny_model), "/v1/completions", {"prompt": "Hi", "max_tokens": 1}, {"X-Resumable": value})
    assert reply.status == status
    if status == 400:
        assert reply.json["error"]["message"] == "the header X-Resumable is 'yes'; it must be true or false"


def test_pages_of_other_origins_may_resume(tiny_model: npqwen.Model) -> None:
    page = {"Origin": "http://localhost:3000"}
    with served(app(tiny_model, origins=[page["Origin"]])) as url:
        with begun(url, body=HELLO | SOME, headers=page) as (id, lines):
            list(lines)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=HELLO, headers=RESUMABLE | page) as response:
            assert response.headers["access-control-allow-origin"] == page["Origin"]
            assert "x-stream-id" in response.headers["access-control-expose-headers"]
            assert "Origin" in response.headers["vary"]
        assert again(url, id, headers=page).headers["access-control-allow-origin"] == page["Origin"]
        wrong = httpx.post(f"{url}/v1/chat/completions", json=HELLO, headers={"X-Resumable": "yes", **page})
        assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (400, page["Origin"])


@pytest.mark.parametrize("value", ["true", "yes"])
def test_who_may_not_call_the_server_learns_nothing_of_its_streams(
    value: str, tiny_model: npqwen.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "COUNT", 0)
    locked = app(tiny_model, api_keys=["mine"])
    assert post(locked, "/v1/chat/completions", HELLO, {"X-Resumable": value}).status == 401
    foreign = {"X-Resumable": value, "Host": "evil.example", "x-api-key": "mine"}
    assert post(locked, "/v1/chat/completions", HELLO, foreign).status == 403


def test_a_model_is_in_use_until_a_stream_without_a_client_ends(
    tiny_model: npqwen.Model, runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "SECONDS", 0.5)
    application = app(tiny_model)
    with served(application) as url, caplog.at_level(logging.INFO, "npqwen.server.exchange"):
        with begun(url, body=HELLO | ENDLESS) as (_, lines):
            next(lines)
        time.sleep(0.1)
        assert application.state.models.in_use == 1
        assert not caplog.records
        wait_until(lambda: not application.state.models.in_use)
        assert runs.newest.cancelled
        wait_until(lambda: caplog.records)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("POST /v1/chat/completions 200 tiny-qwen3-16: ")


def test_unknown_and_foreign_streams_are_the_same_error(tiny_model: npqwen.Model) -> None:
    with served(app(tiny_model, api_keys=["mine", "other"])) as url:
        body = BODIES["/v1/chat/completions"]
        with begun(url, body=body, headers={"Authorization": "Bearer mine"}) as (id, lines):
            list(lines)
        wrong = [again(url, id, headers={"x-api-key": "other"}), again(url, "guess", headers={"x-api-key": "mine"})]
        assert [reply.status_code for reply in wrong] == [404, 404]
        assert wrong[0].json() == wrong[1].json()
        assert wrong[0].json()["error"]["code"] == "stream_not_found"
        assert httpx.delete(f"{url}/v1/streams/{id}", headers={"x-api-key": "other"}).status_code == 404
        assert again(url, id).status_code == 401
        assert again(url, id, headers={"x-api-key": "mine"}).status_code == 200


def test_ids_cannot_be_guessed_or_listed(server: str) -> None:
    ids = set()
    for _ in range(3):
        with begun(server, body=BODIES["/v1/completions"], path="/v1/completions") as (id, _lines):
            ids.add(id)
    assert len(ids) == 3
    assert all(len(id) >= 32 for id in ids)  # 24 random bytes
    assert httpx.get(f"{server}/v1/streams").status_code == 404


@pytest.mark.parametrize("number", ["x", "-1", "1.5", "9" * 400, "1_000"])
def test_a_number_that_is_none_is_refused(server: str, number: str) -> None:
    with begun(server, body=BODIES["/v1/chat/completions"]) as (id, lines):
        list(lines)
    response = httpx.get(f"{server}/v1/streams/{id}", params={"from": number})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "from")
    response = again(server, id, headers={"Last-Event-ID": number})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "Last-Event-ID")
    assert len(response.json()["error"]["message"]) < 200


def test_a_number_beyond_the_end_is_refused(server: str) -> None:
    with begun(server, body=BODIES["/v1/chat/completions"]) as (id, lines):
        end = numbers(list(lines))[-1] + 1
    response = again(server, id, end + 1)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"from is {end + 1}; it must be a whole number from 0 to {end}"


def test_events_that_are_not_kept_any_more_are_an_error(
    scripted: tuple[ScriptedModels, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "BYTES", 2000)
    models, url = scripted
    with begun(url) as (id, lines):
        for count in range(20):
            models.put(Text(f"piece {count}"))
            read_until(lines, f"piece {count}")
    response = again(url, id)
    assert response.status_code == 410
    error = response.json()["error"]
    assert error["code"] == "events_expired"
    first = int(error["message"].rpartition("=")[2])
    assert 0 < first < 20
    with httpx.stream("GET", f"{url}/v1/streams/{id}?from={first}", timeout=30) as response:
        assert f"id: {first}" in next(response.iter_lines())


def test_only_so_many_streams_are_kept(
    scripted: tuple[ScriptedModels, str], tiny_model: npqwen.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "COUNT", 2)
    models, url = scripted
    with begun(url) as (first, lines):
        models.put(finish(tiny_model))
        list(lines)
    wait_until(lambda: again(url, first).status_code == 200)
    with begun(url), begun(url):
        assert again(url, first).status_code == 404  # it has ended, and made room
        response = httpx.post(f"{url}/v1/chat/completions", json=HELLO, headers=RESUMABLE)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
        assert "retry-after" in response.headers
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=HELLO) as response:
            assert response.status_code == 200


def test_a_request_without_its_body_takes_no_place_of_a_stream(
    scripted: tuple[ScriptedModels, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "COUNT", 1)
    _, url = scripted
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as silent:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nX-Resumable: true\r\nContent-Length: 100\r\n\r\n"
        silent.sendall(head.encode())
        time.sleep(0.2)  # until the server has them
        with begun(url):
            pass


def test_the_openai_package_reads_a_resumable_stream(server: str) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        create: Any = client.chat.completions.create
        texts = [
            "".join([chunk.choices[0].delta.content or "" for chunk in stream])
            for headers in ({}, RESUMABLE)
            for stream in [create(model="", **HELLO, **SOME, extra_headers=headers)]
        ]
    assert texts[0] == texts[1] != ""


def test_the_anthropic_package_reads_a_resumable_stream(server: str) -> None:
    with anthropic.Anthropic(base_url=server, api_key="none", max_retries=0) as client:
        texts = []
        for headers in ({}, RESUMABLE):
            options: Any = {"messages": HELLO["messages"], "max_tokens": 30, "extra_headers": headers}
            with client.messages.stream(model="", **options, extra_body={"temperature": 0}) as stream:
                texts.append(stream.get_final_message().content)
    assert [block.model_dump(exclude={"signature"}) for block in texts[0]] == [
        block.model_dump(exclude={"signature"}) for block in texts[1]
    ]
