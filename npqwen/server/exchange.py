"""What one HTTP request uses: the model that it keeps loaded, and the tokens that it costs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npqwen.errors import shortened
from npqwen.generation.completion import Usage

_log = logging.getLogger(__name__)


@dataclass
class Exchange:
    """One HTTP request and its response."""

    model: str | None = None
    """The name of the model that answers it; None if no model was used."""
    prompt_tokens: int = 0
    """Sum over the runs that it started."""
    choices: int = 0
    """Number of answers that it requests."""
    usages: list[Usage] = field(default_factory=list)
    """Those of the answers that have ended."""
    ignored: list[str] = field(default_factory=list)
    """Fields of its body that the server does not know, and so ignored."""
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Called at its end."""
    rest: asyncio.Future[Any] | None = None
    """What may go on when the connection is closed: the exchange ends with it. None: it ends with the connection."""


current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""The exchange that the running code belongs to, also in tasks that its handler has started; None outside of one."""


class Exchanges:
    """ASGI middleware: an `Exchange` for every request, logged at level INFO when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange()
        token = current.set(exchange)
        started = time.perf_counter()
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        def end() -> None:
            for release in exchange.at_end:
                release()
            if _log.isEnabledFor(logging.INFO):
                seconds = time.perf_counter() - started
                path, work, ignored = shortened(scope["path"]), _work(exchange), _ignored(exchange)
                _log.info("%s %s %d%s, %.2f s%s", scope["method"], path, status, work, seconds, ignored)

        try:
            await self._app(scope, receive, noted)
        finally:
            current.reset(token)
            if exchange.rest is None or exchange.rest.done():
                end()
            else:
                exchange.rest.add_done_callback(lambda _: end())


def _work(exchange: Exchange) -> str:
    """The model and the tokens of a request, for the log."""
    model = "" if exchange.model is None else f" {exchange.model}"
    if not exchange.choices:
        return model
    cached = sum(usage.cached_tokens for usage in exchange.usages)
    generated = sum(usage.generated_tokens for usage in exchange.usages)
    ended = "" if len(exchange.usages) == exchange.choices else ", ended early"
    return f"{model}: {exchange.prompt_tokens} prompt tokens, {cached} cached; {generated} generated{ended}"


def _ignored(exchange: Exchange) -> str:
    """The ignored fields of a request, for the log."""
    return f", ignored {shortened(', '.join(exchange.ignored), 200)}" if exchange.ignored else ""
