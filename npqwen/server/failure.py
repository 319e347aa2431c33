"""Errors of requests, in a form that every API translates into its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from npqwen.errors import (
    ClosedError,
    ContextLengthError,
    ModelNotFoundError,
    NpqwenError,
    OptionError,
    OutOfMemoryError,
    QueueFullError,
)
from npqwen.server.exchange import note_problem
from npqwen.server.fields import FieldError

_log = logging.getLogger(__name__)

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""The code that tells clients to shorten the conversation."""


@dataclass(frozen=True)
class Failure:
    """An error as a client sees it.

    status: the HTTP status, set even for an error in the middle of a stream, where it is not sent. code: an identifier
    for programs, None if the status suffices. param: the field at fault. retry_after: seconds, for that header.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The response headers that it requires."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def failure_of(error: BaseException) -> Failure:
    """The failure for an exception, also for the request's line in the log. Unexpected exceptions are logged with their
    traceback."""
    failure = _failure(error)
    note_problem(failure.message)
    return failure


def _failure(error: BaseException) -> Failure:
    if isinstance(error, FieldError):
        return Failure(400, str(error), param=error.param)
    if isinstance(error, ContextLengthError):
        return Failure(400, str(error), CONTEXT_LENGTH_EXCEEDED)
    if isinstance(error, OptionError):
        return Failure(400, str(error))
    if isinstance(error, ModelNotFoundError):
        return Failure(404, str(error), "model_not_found", "model")
    if isinstance(error, QueueFullError):
        return Failure(503, str(error), "queue_full", retry_after=error.retry_after)
    if isinstance(error, ClosedError):
        return Failure(503, str(error), "closed", retry_after=5)
    if isinstance(error, OutOfMemoryError):
        _log.warning("%s", error)
        return Failure(503, str(error), "out_of_memory", retry_after=30)
    _log.error("a request failed", exc_info=error)
    if isinstance(error, NpqwenError):
        return Failure(500, str(error), "internal_error")
    return Failure(500, "internal error; the server's log has the details", "internal_error")
