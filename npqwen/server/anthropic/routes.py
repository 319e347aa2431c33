"""The Messages API's routes."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from npqwen.chat.chat_options import ChatSettings
from npqwen.chat.messages import checked
from npqwen.errors import ClosedError, ContextLengthError
from npqwen.server.anthropic.message import Message
from npqwen.server.anthropic.request import read_request
from npqwen.server.failure import CONTEXT_LENGTH_EXCEEDED, Failure, failure_of
from npqwen.server.fields import read_fields
from npqwen.server.json_text import JSONReply, server_sent
from npqwen.server.streaming import ClientGoneError, StreamedRun, until_disconnected

if TYPE_CHECKING:
    from npqwen.model import Model
    from npqwen.server.models import Models
    from npqwen.server.requests import ChatRequest
    from npqwen.server.run import Progress, Run, RunEvent

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_PING = server_sent({"type": "ping"}, "ping")


def routes(models: Models) -> list[Route]:
    """The routes of the API."""

    async def messages(request: Request) -> Response:
        id = _request_id()
        try:
            body = await read_fields(request)
            name = body.text("model")
            worker = await models.worker(name)
            wanted = read_request(body, worker.model)
            try:
                run = await worker.start(wanted.chat)
            except ContextLengthError as error:
                tokens = await asyncio.to_thread(_prompt_tokens, worker.model, wanted.chat)
                raise _too_long(error, tokens, worker.model.context) from None
            message = Message(name or worker.model.name, run.prompt_tokens, omit_thinking=wanted.omit_thinking)
            return await _answer(request, run, message, wanted.stream, worker.model.context, id)
        except ClientGoneError:
            return Response(status_code=499)
        except Exception as error:
            return error_reply(failure_of(error), id)

    async def count_tokens(request: Request) -> Response:
        id = _request_id()
        try:
            body = await read_fields(request)
            model = (await models.worker(body.text("model"))).model
            wanted = read_request(body, model)
            tokens = await asyncio.to_thread(_prompt_tokens, model, wanted.chat)
            return JSONReply({"input_tokens": tokens}, headers={"request-id": id})
        except Exception as error:
            return error_reply(failure_of(error), id)

    return [
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


def error_reply(failure: Failure, id: str | None = None) -> Response:
    """A failure in the API's shape. id: the request's, None for a new one."""
    id = id or _request_id()
    headers = {"request-id": id, **failure.headers}
    return JSONReply(_error(failure, id), status_code=failure.status, headers=headers)


async def _answer(request: Request, run: Run, message: Message, stream: bool, context: int, id: str) -> Response:
    headers = {"request-id": id}
    if stream:
        return StreamedRun(run, _MessageStream(message, run.prompt_tokens, context, id), headers)

    async def finished() -> dict[str, Any]:
        try:
            async for _, event in run:
                message.push(event)
        except ContextLengthError as error:
            raise _too_long(error, run.prompt_tokens, context) from None
        if not message.finished:
            raise ClosedError("the request was cancelled")
        return message.body

    return JSONReply(await until_disconnected(request, finished(), run), headers=headers)


class _MessageStream:
    """The events of a message as text; see `StreamFormat`."""

    media_type = "text/event-stream"

    def __init__(self, message: Message, prompt_tokens: int, context: int, id: str) -> None:
        self._message = message
        self._prompt_tokens, self._context = prompt_tokens, context
        self._id = id

    def start(self) -> str:
        return _sent(self._message.start()) + _PING

    def event(self, index: int, event: RunEvent) -> str:
        return "".join([_sent(item) for item in self._message.push(event)])

    def keepalive(self, progress: Progress | None) -> str:
        return _PING

    def error(self, failure: Failure) -> str:
        if failure.code == CONTEXT_LENGTH_EXCEEDED:
            error = _too_long(ContextLengthError(failure.message), self._prompt_tokens, self._context)
            failure = failure_of(error)
        return _sent(_error(failure, self._id))

    def end(self) -> str:
        return ""


def _sent(event: dict[str, Any]) -> str:
    return server_sent(event, event["type"])


def _error(failure: Failure, id: str) -> dict[str, Any]:
    kind = _TYPES.get(failure.status, "invalid_request_error" if failure.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}, "request_id": id}


def _too_long(error: ContextLengthError, tokens: int, context: int) -> ContextLengthError:
    """The error in the words from which Claude Code knows that it must shorten the conversation."""
    if tokens < context:
        return error
    return ContextLengthError(f"prompt is too long: {tokens} tokens > {context - 1} maximum")


def _prompt_tokens(model: Model, request: ChatRequest) -> int:
    settings = ChatSettings.of(request.options)
    return len(settings.prompter(model).ids(checked(request.messages)))


def _request_id() -> str:
    return f"req_{secrets.token_hex(12)}"
