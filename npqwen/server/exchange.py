"""What one HTTP request has used: the models that it keeps loaded, and the runs that it started."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    from npqwen.server.run import Run


@dataclass
class Exchange:
    """One HTTP request and its response."""

    model: str | None = None
    """The name of the model that it asked for last."""
    runs: list[Run] = field(default_factory=list)
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Called when the response is complete, or the client is gone."""


current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""The exchange in whose task, or in a task of which, this code runs; None outside of one."""


class Exchanges:
    """ASGI middleware: an `Exchange` for every request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange()
        token = current.set(exchange)
        try:
            await self._app(scope, receive, send)
        finally:
            current.reset(token)
            for release in exchange.at_end:
                release()
