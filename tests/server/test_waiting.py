"""Streams whose model is still being loaded."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from serving import ScriptedModels, scripted_server, wait_until

import npqwen
from npqwen.errors import OutOfMemoryError
from npqwen.server import streaming

HELLO: Any = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 100},
    "/api/chat": {"messages": HELLO},
    "/api/generate": {"prompt": "Hello"},
}
SIGNS = {"/v1/messages": 'data: {"type":"ping"}', "/api/chat": '"content":""', "/api/generate": '"response":""'}


class ColdModels(ScriptedModels):
    """A model whose loading takes until a test calls `load`."""

    def __init__(self, model: npqwen.Model) -> None:
        super().__init__(model)
        self.waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.left = 0

    async def worker(
        self, name: str | None, keep_alive: float | None = None, task: str | None = None
    ) -> ScriptedModels:
        loop = asyncio.get_running_loop()
        self.waiting.append((loop, loop.create_future()))
        try:
            await self.waiting[-1][1]
        except asyncio.CancelledError:
            self.left += 1
            raise
        return self

    def load(self, error: Exception | None = None) -> None:
        """Loading ends, with an error or without one."""
        loop, future = self.waiting[-1]
        if error is None:
            loop.call_soon_threadsafe(future.set_result, None)
        else:
            loop.call_soon_threadsafe(future.set_exception, error)


@pytest.fixture
def cold(tiny_model: npqwen.Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ColdModels, str]]:
    monkeypatch.setattr(streaming, "KEEPALIVE", 0.05)
    models = ColdModels(tiny_model)
    with scripted_server(tiny_model, models) as (_, url):
        yield models, url


@pytest.fixture(scope="module")
def events(tiny_model: npqwen.Model) -> list[Any]:
    """Those of a short chat."""
    return list(tiny_model.stream_chat("Hello", temperature=0, max_tokens=5, thinking=False))


def stream(url: str, path: str, **more: Any) -> Any:
    return httpx.stream("POST", url + path, json=BODIES[path] | {"stream": True, "model": ""} | more, timeout=30)


def signs(lines: Iterator[str], path: str, count: int) -> None:
    """Wait for so many signs of life."""
    while count:
        count -= SIGNS.get(path, ": waiting") in next(lines)


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_lives_while_its_model_is_loaded(cold: tuple[ColdModels, str], path: str) -> None:
    models, url = cold
    with stream(url, path) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        signs(lines, path, 3)
        assert not models.runs
        models.load()
        wait_until(lambda: models.runs)
        models.put(OutOfMemoryError("enough"))
        assert any("enough" in line for line in lines)


@pytest.mark.parametrize("path", BODIES)
def test_an_error_after_a_stream_has_begun_is_in_it(cold: tuple[ColdModels, str], path: str) -> None:
    models, url = cold
    with stream(url, path) as response:
        lines = response.iter_lines()
        signs(lines, path, 1)
        models.load(OutOfMemoryError("too little memory"))
        assert any("too little memory" in line for line in lines)


@pytest.mark.parametrize("path", BODIES)
def test_an_error_in_time_has_its_status(
    cold: tuple[ColdModels, str], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "KEEPALIVE", 30)
    models, url = cold

    async def broken(name: str | None, keep_alive: float | None = None, task: str | None = None) -> ScriptedModels:
        raise OutOfMemoryError("too little memory")

    monkeypatch.setattr(models, "worker", broken)
    with stream(url, path) as response:
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/json"
        assert "too little memory" in response.read().decode()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_meanwhile_is_forgotten(
    cold: tuple[ColdModels, str], path: str, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, url = cold
    if begun:
        with stream(url, path) as response:
            signs(response.iter_lines(), path, 1)
    else:
        monkeypatch.setattr(streaming, "KEEPALIVE", 30)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + path, json=BODIES[path] | {"stream": True}, timeout=0.3)
    wait_until(lambda: models.left == 1)
    assert not models.runs


def test_a_resumable_stream_begins_before_its_model_is_loaded(
    cold: tuple[ColdModels, str], events: list[Any]
) -> None:
    models, url = cold
    body = BODIES["/v1/chat/completions"] | {"stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers={"X-Resumable": "true"}) as response:
        id = response.headers["x-stream-id"]
    models.load()
    wait_until(lambda: models.runs)
    models.put(*events)
    text = httpx.get(f"{url}/v1/streams/{id}", timeout=30).text
    assert text.startswith("id: 0\n: waiting\n\n")
    assert text.endswith("data: [DONE]\n\n")


def clients(url: str) -> dict[str, Any]:
    """What reads an answer's text with the packages of the APIs."""

    def chat() -> str:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            chunks = client.chat.completions.create(model="", messages=HELLO, stream=True)
            return "".join([chunk.choices[0].delta.content or "" for chunk in chunks])

    def responses() -> str:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client, client.responses.stream(model="", input="Hello") as events:
            return "".join([event.delta for event in events if event.type == "response.output_text.delta"])

    def messages() -> str:
        client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
        with client, client.messages.stream(model="", messages=HELLO, max_tokens=9) as events:
            return events.get_final_text()

    def lines() -> str:
        with ollama.Client(url) as client:
            parts = client.chat(model="any", messages=HELLO, stream=True)
            return "".join([part.message.content or "" for part in parts])

    return {"chat": chat, "responses": responses, "messages": messages, "lines": lines}


@pytest.mark.parametrize("api", ["chat", "responses", "messages", "lines"])
def test_clients_ignore_the_signs(cold: tuple[ColdModels, str], api: str, events: list[Any]) -> None:
    models, url = cold
    models.script = events
    cancel = schedule(models, 0.4)
    try:
        assert clients(url)[api]() == events[-1].reply.text != ""
    finally:
        cancel()


def schedule(models: ColdModels, seconds: float) -> Any:
    """Load the model so many seconds after the request for it has come."""
    def later() -> None:
        wait_until(lambda: models.waiting)
        loop, _ = models.waiting[-1]
        loop.call_soon_threadsafe(lambda: loop.call_later(seconds, models.load))

    thread = threading.Thread(target=later, daemon=True)
    thread.start()
    return lambda: thread.join(30)


@pytest.mark.parametrize(("api", "kind"), [("chat", openai.APIError), ("messages", anthropic.APIError)])
def test_clients_understand_an_error_after_the_signs(
    cold: tuple[ColdModels, str], api: str, kind: type[Exception]
) -> None:
    models, url = cold

    async def broken(name: str | None, keep_alive: float | None = None, task: str | None = None) -> ScriptedModels:
        await asyncio.sleep(0.3)
        raise OutOfMemoryError("too little memory")

    models.worker = broken  # type: ignore[method-assign]
    with pytest.raises(kind, match="too little memory"):
        clients(url)[api]()


def test_a_response_that_failed_says_so(cold: tuple[ColdModels, str]) -> None:
    models, url = cold
    with stream(url, "/v1/responses") as response:
        lines = response.iter_lines()
        signs(lines, "/v1/responses", 1)
        models.load(OutOfMemoryError("too little memory"))
        last = [json.loads(line[6:]) for line in lines if line.startswith("data: ")][-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == "too little memory"
