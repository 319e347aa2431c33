"""POST /v1/responses and /v1/responses/input_tokens."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from npqwen.chat.messages import checked
from npqwen.errors import ClosedError, ContextLengthError
from npqwen.server.failure import Failure, failure_of
from npqwen.server.fields import Fields, read_fields
from npqwen.server.json_text import JSONReply, server_sent
from npqwen.server.openai.response_events import Answer
from npqwen.server.openai.response_request import read_request
from npqwen.server.openai.response_tools import ClientTools
from npqwen.server.streaming import StreamedRun, until_disconnected
from npqwen.server.waiting import CommentKeepalives, response_or_keepalives

if TYPE_CHECKING:
    from npqwen.server.models import Models
    from npqwen.server.run import Progress, Run, RunEvent


async def create_response(models: Models, request: Request) -> Response:
    """Answer an input, in one piece or as a stream. Raises what the request's fields, model and worker raise."""
    body = await read_fields(request)
    name = body.text("model")
    if body.flag("stream"):
        keepalives = CommentKeepalives(partial(_only_error, name or ""))
        return await response_or_keepalives(request, _stream(models, body, name), keepalives)
    worker = await models.worker(name)
    wanted = read_request(body, worker.model)
    answer = Answer(name or worker.model.name, wanted.echo, wanted.tools, summary=wanted.summary)
    run = await worker.start(wanted.chat)
    return JSONReply(await until_disconnected(request, _finished(run, answer), run))


async def _stream(models: Models, body: Fields, name: str | None) -> Response:
    worker = await models.worker(name)
    wanted = read_request(body, worker.model)
    answer = Answer(name or worker.model.name, wanted.echo, wanted.tools, summary=wanted.summary)
    try:
        run = await worker.start(wanted.chat)
    except ContextLengthError as error:
        # Codex shortens the conversation if a stream ends with this error, but not on status 400
        return Response(_sent(answer.start() + answer.fail(failure_of(error))), media_type=_Events.media_type)
    return StreamedRun(run, _Events(answer))


def _only_error(name: str, failure: Failure) -> str:
    """The text of a stream that fails before its run has started."""
    answer = Answer(name, {}, ClientTools())
    return _sent(answer.start() + answer.fail(failure))


async def _finished(run: Run, answer: Answer) -> dict[str, Any]:
    await run.for_each(lambda index, event: answer.push(event))
    if not answer.finished:
        raise ClosedError("the request was cancelled")
    return answer.body


async def count_input_tokens(models: Models, request: Request) -> Response:
    """Count the tokens of the prompt that an input would become. Raises what its fields and model raise."""
    body = await read_fields(request)
    model = (await models.worker(body.text("model"))).model
    chat = read_request(body, model).chat
    ids = await asyncio.to_thread(lambda: chat.settings().prompter(model).ids(checked(chat.messages)))
    return JSONReply({"object": "response.input_tokens", "input_tokens": len(ids)})


class _Events:
    """The events of a response as text; see `StreamFormat`."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def start(self) -> str:
        return _sent(self._answer.start())

    def event(self, index: int, event: RunEvent) -> str:
        return _sent(self._answer.push(event))

    def keepalive(self, progress: Progress | None) -> str:
        return _sent(self._answer.keepalive())  # Codex does not count comments as activity

    def error(self, failure: Failure) -> str:
        return _sent(self._answer.fail(failure))

    def end(self) -> str:
        return ""


def _sent(events: list[dict[str, Any]]) -> str:
    return "".join([server_sent(event, event["type"]) for event in events])
