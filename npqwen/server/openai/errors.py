"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any

from npqwen.server.failure import Failure
from npqwen.server.json_text import server_sent

_TYPES = {401: "authentication_error", 403: "permission_error"}


def error_body(failure: Failure) -> dict[str, Any]:
    """The body of an error, which is also an event in the middle of a stream."""
    kind = _TYPES.get(failure.status, "server_error" if failure.status >= 500 else "invalid_request_error")
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}}


def error_event(failure: Failure) -> str:
    """An error in a stream of chunks, which it ends."""
    return server_sent(error_body(failure))
