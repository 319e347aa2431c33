"""uvicorn's HTTP connection, closed if headers take too long, and with JSON as the answer to what is not HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from npqwen.server.exchange import HEADER, SCOPE_ID, request_id
from npqwen.server.failure import Failure
from npqwen.server.refusal import refusal

HEADERS_SECONDS = 60.0
"""Seconds that a request's headers may take from its first byte; a connection's first ones, from the connection."""
_INVALID = Failure(
    400,
    "this is not valid HTTP; check the request's headers, which must not be too long, and the sizes of its chunks",
    "invalid_http",
)


class Connection(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """For `uvicorn.Config(http=Connection)`. uvicorn itself only limits the time between two requests, and answers what
    is not HTTP with plain text."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._late: asyncio.TimerHandle | None = None
        self._heard = 0.0  # when the client last sent something, in the loop's time

    @property
    def idle_since(self) -> float | None:
        """When its client last sent something, in the loop's time; None during an answer, and once it is closing."""
        return None if self._is_answering or self.transport.is_closing() else self._heard

    def connection_made(self, transport: Any) -> None:
        self._heard = self.loop.time()
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be parsed, and close. uvicorn calls this; it would send its `msg` as text."""
        scope, begun = {"path": "/"}, False
        if self._is_answering:  # it is the body that cannot be parsed
            cycle = self.cycle
            scope, begun = cycle.scope, cycle.response_started
            cycle.disconnected = True  # nothing may follow
            cycle.message_event.set()
        if not begun:
            own = {HEADER: scope.get(SCOPE_ID) or request_id(), "connection": "close"}
            response = refusal(scope, _INVALID, own)
            headers = [*self.server_state.default_headers, *response.raw_headers]
            lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in headers), b"", b""]
            self.transport.write(b"\r\n".join(lines) + bytes(response.body))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """A request for WebSocket is answered like any other; uvicorn would log how to install support for it."""

    @property
    def _is_answering(self) -> bool:
        """Whether the newest request that has all of its headers has no complete response yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Start the timeout if headers are incomplete, and stop it if they are complete."""
        if self._is_answering:
            self._stop()
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEADERS_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
