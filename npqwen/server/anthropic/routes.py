"""The Messages API's routes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from npqwen.chat.messages import checked
from npqwen.errors import ClosedError, ContextLengthError
from npqwen.server.anthropic.errors import answering_errors, error_body
from npqwen.server.anthropic.message import Message
from npqwen.server.anthropic.request import read_request
from npqwen.server.fields import Fields, read_fields
from npqwen.server.json_text import JSONReply, server_sent
from npqwen.server.streaming import StreamedRun, until_disconnected
from npqwen.server.waiting import response_or_keepalives

if TYPE_CHECKING:
    from npqwen.model import Model
    from npqwen.server.failure import Failure
    from npqwen.server.models import Models
    from npqwen.server.requests import ChatRequest
    from npqwen.server.run import Progress, Run, RunEvent

_PING = server_sent({"type": "ping"}, "ping")


def routes(models: Models) -> list[Route]:
    """The routes of the API."""

    async def messages(request: Request, id: str) -> Response:
        body = await read_fields(request)
        if body.flag("stream"):
            return await response_or_keepalives(request, stream(body, id), _Pings(id))
        run, message = await begin(body)
        return JSONReply(await until_disconnected(request, _finished(run, message), run))

    async def stream(body: Fields, id: str) -> Response:
        run, message = await begin(body)
        return StreamedRun(run, _MessageStream(message, id))

    async def begin(body: Fields) -> tuple[Run, Message]:
        name = body.text("model")
        worker = await models.worker(name)
        wanted = read_request(body, worker.model)
        try:
            run = await worker.start(wanted.chat)
        except ContextLengthError as error:
            tokens = await asyncio.to_thread(_prompt_tokens, worker.model, wanted.chat)
            raise _too_long(error, tokens, worker.model.context) from None
        return run, Message(name or worker.model.name, run.prompt_tokens, omit_thinking=wanted.omit_thinking)

    async def count_tokens(request: Request, id: str) -> Response:
        body = await read_fields(request)
        model = (await models.worker(body.text("model"))).model
        tokens = await asyncio.to_thread(_prompt_tokens, model, read_request(body, model).chat)
        return JSONReply({"input_tokens": tokens})

    return [
        Route("/v1/messages", answering_errors(messages), methods=["POST"]),
        Route("/v1/messages/count_tokens", answering_errors(count_tokens), methods=["POST"]),
    ]


async def _finished(run: Run, message: Message) -> dict[str, Any]:
    await run.for_each(lambda index, event: message.push(event))
    if not message.finished:
        raise ClosedError("the request was cancelled")
    return message.body


class _Pings:
    """Pings as keepalives, and an error as an event; see `KeepaliveFormat`."""

    media_type = "text/event-stream"

    def __init__(self, id: str) -> None:
        """id: the request's."""
        self._id = id

    def keepalive(self, progress: Progress | None) -> str:
        return _PING

    def error(self, failure: Failure) -> str:
        return _sent(error_body(failure, self._id))


class _MessageStream:
    """The events of a message as text; see `StreamFormat`."""

    media_type = "text/event-stream"

    def __init__(self, message: Message, id: str) -> None:
        """id: the request's."""
        self._message = message
        self._id = id

    def start(self) -> str:
        return _sent(self._message.start()) + _PING

    def event(self, index: int, event: RunEvent) -> str:
        return "".join([_sent(item) for item in self._message.push(event)])

    def keepalive(self, progress: Progress | None) -> str:
        return _PING

    def error(self, failure: Failure) -> str:
        return _sent(error_body(failure, self._id))

    def end(self) -> str:
        return ""


def _sent(event: dict[str, Any]) -> str:
    return server_sent(event, event["type"])


def _too_long(error: ContextLengthError, tokens: int, context: int) -> ContextLengthError:
    """The error in the wording that makes Claude Code shorten the conversation."""
    if tokens < context:
        return error
    return ContextLengthError(f"prompt is too long: {tokens} tokens > {context - 1} maximum")


def _prompt_tokens(model: Model, request: ChatRequest) -> int:
    return len(request.settings().prompter(model).ids(checked(request.messages)))
