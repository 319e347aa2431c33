"""uvicorn's HTTP connection, closed if a client takes too long to send the headers of a request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADERS_SECONDS = 60.0
"""Seconds that a request's headers may take from its first byte; a connection's first ones, from the connection."""


class Connection(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """For `uvicorn.Config(http=Connection)`. uvicorn itself only limits the time between two requests."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the timeout if headers are incomplete, and stop it if they are complete."""
        cycle = self.cycle  # the newest request that has all of its headers
        if cycle is not None and not cycle.response_complete:
            self._stop()
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEADERS_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
