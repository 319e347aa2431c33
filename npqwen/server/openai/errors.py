"""Errors in OpenAI's shape, and handlers that answer with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from npqwen.server.failure import Failure, failure_of
from npqwen.server.json_text import JSONReply
from npqwen.server.streaming import ClientGoneError

Handler = Callable[[Request], Awaitable[Response]]

CLIENT_GONE = 499
"""nginx's status for a client that closed the connection; nobody reads it but a log."""


def error_body(failure: Failure) -> dict[str, Any]:
    """The body of an error, which is also an event in the middle of a stream."""
    kind = "server_error" if failure.status >= 500 else "invalid_request_error"
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}}


def answering_errors(handler: Handler) -> Handler:
    """A handler that answers with an error, in OpenAI's shape, whatever `handler` raises."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except (ClientDisconnect, ClientGoneError):
            return Response(status_code=CLIENT_GONE)
        except HTTPException:
            raise
        except Exception as error:
            failure = failure_of(error)
            return JSONReply(error_body(failure), failure.status, failure.headers)

    return answer
