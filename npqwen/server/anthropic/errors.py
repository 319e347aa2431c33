"""Errors in Anthropic's format, and handlers that answer with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from npqwen.server.exchange import request_id
from npqwen.server.failure import Failure, failure_of
from npqwen.server.json_text import JSONReply
from npqwen.server.streaming import ClientGoneError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(failure: Failure, id: str) -> dict[str, Any]:
    """The body of an error, which is also an event in the middle of a stream. id: the request's."""
    kind = _TYPES.get(failure.status, "api_error" if failure.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}, "request_id": id}


def answering_errors(
    handler: Callable[[Request, str], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Wrap `handler` so that exceptions become error responses in Anthropic's format.

    handler(request, id): id is the request's, which the response has in the header request-id. Disconnects and
    HTTPException propagate.
    """

    async def answer(request: Request) -> Response:
        id = request_id()
        try:
            response = await handler(request, id)
        except (ClientDisconnect, ClientGoneError, HTTPException):
            raise
        except Exception as error:
            failure = failure_of(error)
            response = JSONReply(error_body(failure, id), failure.status, failure.headers)
        response.headers["request-id"] = id
        return response

    return answer
