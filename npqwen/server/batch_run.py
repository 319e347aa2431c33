"""Answers the requests of a batch by calling the server's own application, without a socket."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import ASGIApp, Message

from npqwen.server.app import application
from npqwen.server.batch_file import Answers, BatchInput, BatchRequest
from npqwen.server.json_text import json_text
from npqwen.server.models import Models
from npqwen.server.settings import Settings

AHEAD = 1024
"""With ordered output, the most requests that have been started and whose answers are not written yet."""


@dataclass
class BatchCounts:
    """Totals of a batch. answered: requests, failed ones included. failed: requests whose answer is an error. tokens:
    generated tokens of all answers.
    """

    answered: int = 0
    failed: int = 0
    tokens: int = 0


def run(
    models: Models,
    settings: Settings,
    requests: BatchInput,
    output: Answers,
    *,
    model: str | None = None,
    ordered: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> BatchCounts:
    """Answer the requests that the output lacks, and append the answers to it. Closes the models.

    model: answers all requests, whatever model they name. ordered: write answers in the order of the requests;
    otherwise each as soon as it is complete. progress(done, total): called with numbers of requests.

    Twice as many requests are in progress as the model runs at once, so that its batches are always full. The answer
    to a request that fails is the error. After an interrupt, answers that were written are kept. Raises OutputError if
    the output cannot be written, OptionError if the file of requests has changed.
    """
    settings = replace(settings, queue=max(settings.queue, 2 * settings.parallel))
    return asyncio.run(_run(models, settings, requests, output, model, ordered, progress))


async def _run(
    models: Models,
    settings: Settings,
    requests: BatchInput,
    output: Answers,
    model: str | None,
    ordered: bool,
    progress: Callable[[int, int], None] | None,
) -> BatchCounts:
    app = application(models, settings)
    left = [one for one in requests.custom_ids if one not in output.answered]
    total = len(requests.custom_ids)
    written, counts = _Written(output, left if ordered else None), BatchCounts()
    numbered = iter(enumerate(left))

    async def answer_next() -> None:
        for at, custom_id in numbered:
            await written.near(at)
            request = requests.read(custom_id)
            status, body = await _post(app, request, model)
            counts.answered += 1
            counts.failed += status != 200
            counts.tokens += _tokens(body)
            written.add(_answer(request, status, body))
            if progress:
                progress(total - len(left) + counts.answered, total)

    if progress:
        progress(total - len(left), total)
    tasks = [asyncio.create_task(answer_next()) for _ in range(2 * settings.parallel)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await models.close()
    return counts


class _Written:
    """Writes answers, in the given order if there is one."""

    def __init__(self, output: Answers, order: list[str] | None) -> None:
        self._output = output
        self._order: Iterator[str] | None = None if order is None else iter(order)
        self._next = None if self._order is None else next(self._order, None)
        self._count = 0
        self._waiting: dict[str, dict[str, Any]] = {}
        self._moved = asyncio.Event()

    async def near(self, at: int) -> None:
        """Wait until answer `at` is fewer than `AHEAD` places after the next one to be written."""
        while self._order is not None and at >= self._count + AHEAD:
            self._moved.clear()
            await self._moved.wait()

    def add(self, answer: dict[str, Any]) -> None:
        """Write an answer, or hold it until all earlier ones are written."""
        if self._order is None:
            self._output.write(answer)
            return
        self._waiting[answer["custom_id"]] = answer
        while self._next is not None and self._next in self._waiting:
            self._output.write(self._waiting.pop(self._next))
            self._next = next(self._order, None)
            self._count += 1
        self._moved.set()


async def _post(app: ASGIApp, request: BatchRequest, model: str | None) -> tuple[int, Any]:
    """Status and body of the application's answer."""
    body = request.body | {"stream": False} | ({} if model is None else {"model": model})
    body.pop("stream_options", None)
    sent = [{"type": "http.request", "body": json_text(body).encode(), "more_body": False}]
    status, pieces = 500, []

    async def receive() -> Message:
        if sent:
            return sent.pop()
        await asyncio.Event().wait()  # this client never disconnects
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": request.url,
        "raw_path": request.url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return status, json.loads(b"".join(pieces))


def _answer(request: BatchRequest, status: int, body: Any) -> dict[str, Any]:
    """A line of the output, in OpenAI's format."""
    response = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
    id = f"batch_req_{secrets.token_hex(12)}"
    return {"id": id, "custom_id": request.custom_id, "response": response, "error": None}


def _tokens(body: Any) -> int:
    usage = body.get("usage") if isinstance(body, dict) else None
    found = usage.get("completion_tokens", usage.get("output_tokens")) if isinstance(usage, dict) else None
    return found if isinstance(found, int) else 0
