"""Keepalives of streams whose response is not ready yet, such as while their model is being loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from npqwen.server import streaming
from npqwen.server.failure import Failure, failure_of
from npqwen.server.run import Progress
from npqwen.server.streaming import ClientGoneError, disconnected

COMMENT = ": waiting\n\n"
"""A server-sent comment: every client ignores it, but to proxies the connection is not idle."""


class KeepaliveFormat(Protocol):
    """How an API's stream writes keepalives and errors before its response is ready: a part of `StreamFormat`."""

    media_type: str

    def keepalive(self, progress: Progress | None) -> str:
        """A keepalive, which clients ignore. progress: always None."""

    def error(self, failure: Failure) -> str:
        """An error, as the only event."""


class CommentKeepalives:
    """Server-sent events: comments as keepalives."""

    media_type = "text/event-stream"

    def __init__(self, error: Callable[[Failure], str]) -> None:
        self.error = error

    def keepalive(self, progress: Progress | None) -> str:
        return COMMENT


async def response_or_keepalives(
    request: Request, response: Coroutine[Any, Any, Response], keepalives: KeepaliveFormat
) -> Response:
    """The response to a request for a stream, if it is ready within `streaming.KEEPALIVE` seconds.

    Otherwise a response that begins at once: it sends keepalives, and then the awaited response's body, or an error as
    an event, because the status has already been sent. The request's body must have been read. Raises what `response`
    raises within that time, and ClientGoneError if the client disconnects first.
    """
    making = asyncio.create_task(response)
    gone = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({making, gone}, timeout=streaming.KEEPALIVE, return_when=asyncio.FIRST_COMPLETED)
        if making.done():
            return making.result()
        if gone.done():
            raise ClientGoneError
    except BaseException:
        making.cancel()
        raise
    finally:
        gone.cancel()
    return _Late(making, keepalives)


class _Late(Response):
    """A response that begins before the one whose body it sends is ready."""

    def __init__(self, making: asyncio.Task[Response], keepalives: KeepaliveFormat) -> None:
        self.status_code = 200
        self.media_type = keepalives.media_type
        self.background = None
        self.init_headers(streaming.HEADERS)
        self._making = making
        self._keepalives = keepalives

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.create_task(disconnected(receive))
        try:
            while not self._making.done() and not gone.done():
                await _send_text(send, self._keepalives.keepalive(None))
                await asyncio.wait(
                    {self._making, gone}, timeout=streaming.KEEPALIVE, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            gone.cancel()
            if not self._making.done():
                self._making.cancel()
        try:
            response = await self._making
        except asyncio.CancelledError:
            return  # the client is gone
        except Exception as problem:
            await _send_text(send, self._keepalives.error(failure_of(problem)), last=True)
            return

        async def body(message: Message) -> None:
            if message["type"] != "http.response.start":
                await send(message)

        await response(scope, receive, body)


async def _send_text(send: Send, text: str, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": not last})
