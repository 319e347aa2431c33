"""The page with an OpenAI API whose answers tests write piece by piece: nothing in it depends on time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from serving import served, wait_until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from npqwen.server import page

HOLD = object()
"""A step of an answer: wait until the test calls `release`."""
DROP = object()
"""A step of an answer: the connection breaks."""
Chunk = dict[str, Any]


def text(*pieces: str) -> list[Chunk]:
    """Steps: pieces of the answer's text."""
    return [_delta({"content": piece}) for piece in pieces]


def thought(*pieces: str) -> list[Chunk]:
    """Steps: pieces of the reasoning."""
    return [_delta({"reasoning_content": piece}) for piece in pieces]


def call(index: int, id: str, name: str, *arguments: str) -> list[Chunk]:
    """Steps: a tool call; its arguments come in pieces."""
    first = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
    rest = [{"index": index, "function": {"arguments": piece}} for piece in arguments]
    return [_delta({"tool_calls": [one]}) for one in (first, *rest)]


def progress(done: int, total: int, cached: int = 0) -> list[Chunk]:
    """A step: how much of the prompt has been read."""
    return [_delta({}) | {"prompt_progress": {"total": total, "cache": cached, "processed": done, "time_ms": 1}}]


def failure(message: str) -> list[Chunk]:
    """A step: an error in the middle of the stream."""
    return [{"error": {"message": message, "type": "server_error", "code": None}}]


def end(reason: str = "stop", prompt: int = 20, completion: int = 10, reasoning: int = 0) -> list[Chunk]:
    """The last steps."""
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    return [_delta({}, reason), {"object": "chat.completion.chunk", "choices": [], "usage": usage}]


def _delta(delta: dict[str, Any], finish: str | None = None) -> Chunk:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice], "usage": None}


@dataclass(frozen=True)
class Refusal:
    """An answer that is an error from the beginning."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        error = {"message": self.message, "type": "invalid_request_error", "code": None}
        return JSONResponse({"error": error}, self.status, self.headers)


@dataclass
class Received:
    """A request for an answer. ended: "complete", "cancelled" (the client is gone), "dropped" or "" (not yet)."""

    body: dict[str, Any]
    ended: str = ""


class FakeApi:
    """A server at `url`, and a second time at `url` + "inner/" as a mounted app.

    answers: what is left to be said. requests: those for an answer. key, models: as in a real server.
    """

    def __init__(self) -> None:
        self.reset()
        routes = [
            *page.routes(),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        self._app = Starlette(routes=[Mount("/inner", Starlette(routes=routes)), *routes])

    @contextmanager
    def serve(self) -> Iterator[FakeApi]:
        """Serve while the block runs."""
        with served(self._app) as address:
            self.url = f"{address}/"
            yield self

    def reset(self) -> None:
        """Forget answers and requests."""
        self._holding: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.answers: list[list[Any] | Refusal] = []
        self.requests: list[Received] = []
        self.key: str | None = None
        self.models: list[dict[str, Any]] = [{"id": "tiny-qwen3", "object": "model", "context_length": 2048}]

    def answer(self, *steps: Any) -> None:
        """Queue an answer: a Refusal, or steps; lists of steps are joined."""
        if isinstance(steps[0], Refusal):
            self.answers.append(steps[0])
        else:
            self.answers.append([one for step in steps for one in (step if isinstance(step, list) else [step])])

    def release(self) -> None:
        """Let the answer that came to a HOLD last continue; wait for it to come there."""
        wait_until(lambda: self._holding)
        loop, event = self._holding.pop()
        loop.call_soon_threadsafe(event.set)

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return Refusal(401, "the API key is missing or wrong").response()

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"object": "list", "data": self.models})

    async def _chat(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        received = Received(await request.json())
        self.requests.append(received)
        steps = self.answers.pop(0) if self.answers else [*text("Hello."), *end()]
        if isinstance(steps, Refusal):
            received.ended = "complete"
            return steps.response()
        return StreamingResponse(self._stream(steps, received), media_type="text/event-stream")

    async def _stream(self, steps: list[Any], received: Received) -> AsyncIterator[str]:
        try:
            yield f"data: {json.dumps(_delta({'role': 'assistant', 'content': ''}))}\n\n"
            for step in steps:
                if step is HOLD:
                    event = asyncio.Event()
                    self._holding.append((asyncio.get_running_loop(), event))
                    await event.wait()
                elif step is DROP:
                    received.ended = "dropped"
                    raise ConnectionAbortedError
                else:
                    yield f"data: {json.dumps(step, ensure_ascii=False)}\n\n"
            received.ended = "complete"
            yield "data: [DONE]\n\n"
        finally:
            received.ended = received.ended or "cancelled"
