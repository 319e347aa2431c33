"""Clients that vanish: their runs end at once, whatever the run is doing, and whether it streams or not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import Runs, ScriptedModels, scripted_server, wait_until

import npqwen
from npqwen.chat.events import Reasoning, Text
from npqwen.server.json_text import json_text
from npqwen.server.run import Progress, Run

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
}
ENDLESS = {"logit_bias": {"4096": -100, "4098": -100}, "temperature": 1.5, "seed": 1}
"""Keeps the example model from ending its text before the context is full."""

pytestmark = pytest.mark.parametrize("path", BODIES)


@pytest.fixture
def scripted(tiny_model: npqwen.Model) -> Iterator[tuple[ScriptedModels, str]]:
    with scripted_server(tiny_model) as server:
        yield server


def post(url: str, path: str, **fields: Any) -> socket.socket:
    """A connection that has sent a request and read nothing."""
    host, port = url.removeprefix("http://").split(":")
    body = json_text(BODIES[path] | fields).encode()
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def begun(scripted: tuple[ScriptedModels, str], path: str, stream: bool) -> tuple[ScriptedModels, socket.socket, Run]:
    """A request whose run has begun."""
    models, url = scripted
    connection = post(url, path, stream=stream)
    wait_until(lambda: models.runs)
    return models, connection, models.runs[-1]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_prompt_is_read_ends_its_run(
    scripted: tuple[ScriptedModels, str], path: str, stream: bool
) -> None:
    models, connection, run = begun(scripted, path, stream)
    models.put(Progress(1, 20, 0))
    assert not run.cancelled
    connection.close()
    wait_until(lambda: run.cancelled)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_the_middle_of_an_answer_ends_its_run(
    scripted: tuple[ScriptedModels, str], path: str, stream: bool
) -> None:
    models, connection, run = begun(scripted, path, stream)
    models.put(Reasoning("a") if "chat" in path else Text("a"), Text(" zebra"))
    if stream:
        received = b""
        while b" zebra" not in received:
            received += connection.recv(4096)
    assert not run.cancelled
    connection.close()
    wait_until(lambda: run.cancelled)


@pytest.mark.parametrize("stream", [True, False])
def test_the_engine_is_free_for_others_when_a_client_has_left(
    server: str, runs: Runs, path: str, stream: bool
) -> None:
    connection = post(server, path, stream=stream, **ENDLESS)
    wait_until(lambda: runs.all)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
    connection.close()
    wait_until(lambda: runs.all[0].cancelled)
    answer = httpx.post(server + path, json=BODIES[path] | {"max_tokens": 2}, timeout=30)
    assert answer.status_code == 200
    assert not runs.newest.cancelled


def test_a_client_that_closes_its_stream_early_ends_the_run(server: str, runs: Runs, path: str) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        stream: Any
        if "chat" in path:
            stream = client.chat.completions.create(
                model="", messages=[{"role": "user", "content": "Hello"}], stream=True, extra_body=ENDLESS
            )
        else:
            stream = client.completions.create(model="", prompt="Hello", stream=True, extra_body=ENDLESS)
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        stream.close()
    wait_until(lambda: runs.newest.cancelled)
