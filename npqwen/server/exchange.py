"""What one HTTP request uses: the model that it keeps loaded, and the tokens that it costs."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npqwen.wording import shortened

_log = logging.getLogger(__name__)


HEADER = "x-request-id"
"""The header with a request's id: of the response, and of a request whose client has chosen one."""
SCOPE_ID = "npqwen.request_id"
"""The scope's entry with the request's id, for the handler of errors, which runs after the exchange has ended."""
_SANE_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")


def _new_id() -> str:
    return f"req_{secrets.token_hex(12)}"


class Computation(Protocol):
    """What a request has a model compute: a `Run`."""

    @property
    def prompt_tokens(self) -> int:
        """Including those that the template adds."""

    @property
    def progress(self) -> Callable[[], tuple[int, int]]:
        """Returns how many tokens of the prompt were cached, and how many are generated so far."""

    @property
    def complete(self) -> bool:
        """Whether all its choices have ended by themselves."""


@dataclass
class Exchange:
    """One HTTP request and its response."""

    id: str = field(default_factory=_new_id)
    """By which a client and the log refer to it."""
    owner: str = ""
    """Whose it is, if several API keys are valid; "" otherwise."""
    model: str | None = None
    """The name of the model that answers it; None if no model was used."""
    computations: list[Computation] = field(default_factory=list)
    """What it had the model compute."""
    ignored: list[str] = field(default_factory=list)
    """Fields of its body that the server does not know, and so ignored."""
    problem: str = ""
    """Why it failed, as its client was told; "" if it did not."""
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Called at its end."""
    rest: asyncio.Future[Any] | None = None
    """What may go on when the connection is closed: the exchange ends with it. None: it ends with the connection."""


def request_id() -> str:
    """The id of the current HTTP request; a new one outside of a request."""
    exchange = current.get()
    return _new_id() if exchange is None else exchange.id


current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""The exchange that the running code belongs to, also in tasks that its handler has started; None outside of one."""


def cache_salt(given: str | None) -> str:
    """The option `cache_salt` of the current HTTP request's texts: that of its body, if any, for its owner alone."""
    exchange = current.get()
    owner = "" if exchange is None else exchange.owner
    return f"{owner} {given or ''}" if owner else given or ""


def note_problem(message: str) -> None:
    """Have the log's line for the current HTTP request say why it failed. Does nothing outside of a request."""
    exchange = current.get()
    if exchange is not None:
        exchange.problem = message


class Exchanges:
    """ASGI middleware: an `Exchange` for every request, logged at level INFO when it ends.

    Its id is the one in the request's `HEADER` if that has at most 128 letters, digits and characters of ids; the
    response has it in the same header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        exchange = Exchange(given) if _SANE_ID.fullmatch(given) else Exchange()
        scope[SCOPE_ID] = exchange.id
        token = current.set(exchange)
        started = time.perf_counter()
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (HEADER.encode(), exchange.id.encode())
                message = {**message, "headers": [*message.get("headers", ()), own]}
            await send(message)

        def end() -> None:
            for release in exchange.at_end:
                release()
            if _log.isEnabledFor(logging.INFO):
                seconds = time.perf_counter() - started
                path, work = shortened(scope["path"]), _work(exchange)
                rest = f"{_ignored(exchange)}, {exchange.id}{_problem(exchange)}"
                _log.info("%s %s %d%s, %.2f s%s", scope["method"], path, status, work, seconds, rest)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = status or 500  # which Starlette's own middleware, around this one, answers
            raise
        finally:
            current.reset(token)
            if exchange.rest is None or exchange.rest.done():
                end()
            else:
                exchange.rest.add_done_callback(lambda _: end())


def _work(exchange: Exchange) -> str:
    """The model and the tokens of a request, for the log."""
    model = "" if exchange.model is None else f" {exchange.model}"
    if not exchange.computations:
        return model
    prompt = sum(one.prompt_tokens for one in exchange.computations)
    cached, generated = (sum(counts) for counts in zip(*(one.progress() for one in exchange.computations), strict=True))
    ended = "" if all(one.complete for one in exchange.computations) else ", ended early"
    return f"{model}: {prompt} prompt tokens, {cached} cached; {generated} generated{ended}"


def _problem(exchange: Exchange) -> str:
    """Why a request failed, for the log."""
    return f": {shortened(exchange.problem, 200)}" if exchange.problem else ""


def _ignored(exchange: Exchange) -> str:
    """The ignored fields of a request, for the log."""
    return f", ignored {shortened(', '.join(exchange.ignored), 200)}" if exchange.ignored else ""
