"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any

from npqwen.server.failure import Failure
from npqwen.server.json_text import server_sent


def error_body(failure: Failure) -> dict[str, Any]:
    """An error as an event in the middle of a stream. As a response, `npqwen.server.refusal` writes it."""
    kind = "server_error" if failure.status >= 500 else "invalid_request_error"
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}}


def error_event(failure: Failure) -> str:
    """An error in a stream of chunks, which it ends."""
    return server_sent(error_body(failure))
