"""Resumable streams: the middleware that records them, and the routes below /v1/streams."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npqwen.checks import whole_range
from npqwen.server.exchange import current
from npqwen.server.failure import Failure
from npqwen.server.fields import FieldError
from npqwen.server.guard import OWNER
from npqwen.server.recording import EventsGoneError, Follower, Recording, Recordings
from npqwen.server.refusal import refusal
from npqwen.server.streaming import STALLED, disconnected
from npqwen.server.time_limit import within
from npqwen.wording import quoted

HEADER = "x-resumable"
"""The request header with which a client requests a resumable stream."""

_log = logging.getLogger(__name__)


class Resumable:
    """ASGI middleware that decouples POST requests with `HEADER` from their connection if the response is a stream.

    The response has the stream's id in the header X-Stream-Id. When its client disconnects, the application receives
    the disconnect only after `recording.SECONDS` without any client. Until the stream begins, and for other responses,
    `HEADER` has no effect.
    """

    def __init__(self, app: ASGIApp, recordings: Recordings) -> None:
        self._app = app
        self._recordings = recordings
        self._running: set[asyncio.Future[None]] = set()
        """Requests whose connection may be gone; an event loop holds only weak references to its tasks."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = Headers(scope=scope).get(HEADER) if scope["type"] == "http" and scope["method"] == "POST" else None
        if wanted is None or wanted.lower() == "false":
            await self._app(scope, receive, send)
            return
        if wanted.lower() != "true":
            failure = Failure(400, f"the header X-Resumable is {quoted(wanted)}; it must be true or false")
            await refusal(scope, failure)(scope, receive, send)
            return
        recording = Recording(self._recordings)
        recorded = _Recorded(self._recordings, recording, scope, receive, send)
        running = asyncio.ensure_future(self._app(scope, recorded.receive, recorded.send))
        if (exchange := current.get()) is not None:
            exchange.rest = running
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        try:
            await recorded.respond(running)
        finally:
            if not recording.begun.is_set():
                running.cancel()
                self._recordings.forget(recording)


class _Recorded:
    """A request that is being recorded, and the connection that it arrived on."""

    def __init__(
        self, recordings: Recordings, recording: Recording, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._recordings = recordings
        self._recording = recording
        self._scope = scope
        self._client_receive = receive
        self._client_send = send
        self._body_read = asyncio.Event()
        self._follower: Follower | None = None

    async def respond(self, running: asyncio.Future[None]) -> None:
        """Send the client the response of `running`, the application called with `receive` and `send`."""
        recording = self._recording
        begun: asyncio.Future[Any] = asyncio.ensure_future(recording.begun.wait())
        gone: asyncio.Future[Any] = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({running, begun, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()
            gone.cancel()
        if self._follower is None:
            if gone.done():
                recording.gone.set()
            await running
        else:
            running.add_done_callback(partial(_finish, recording))
            await Follow(recording, self._follower)(self._scope, self._client_receive, self._client_send)

    async def receive(self) -> Message:
        """The application's `receive`: the client's messages up to the body's end, then the final disconnect.

        Raises QueueFullError at the body's end if there are too many streams: a body that never comes takes no place.
        """
        if not self._body_read.is_set():
            message = await self._client_receive()
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                self._body_read.set()
                if message["type"] == "http.request":
                    self._recordings.keep(self._recording)
            return message
        await self._recording.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        streams = message["type"] == "http.response.start" and message["status"] == 200
        if streams and not self._recording.gone.is_set():
            self._follower = self._recording.begin(message["headers"], self._scope.get(OWNER))
        if self._follower is None:
            await self._client_send(message)
        elif message["type"] == "http.response.body":
            await self._recording.add(message.get("body", b""), message.get("more_body", False))

    async def _gone(self) -> None:
        await self._body_read.wait()
        await disconnected(self._client_receive)


def _finish(recording: Recording, running: asyncio.Future[None]) -> None:
    """End the recording when the application has returned or raised; log what it raised."""
    recording.finish()
    if not running.cancelled() and (error := running.exception()) is not None:
        _log.error("a request failed", exc_info=error)


class Follow(Response):
    """A response that sends a recording's events to a follower as they arrive."""

    def __init__(self, recording: Recording, follower: Follower) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = list(recording.headers)
        self._recording = recording
        self._follower = follower

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({writer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            self._recording.leave(self._follower)
            writer.cancel()
            gone.cancel()
            await asyncio.gather(writer, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            while (events := await self._recording.take(self._follower)) is not None:
                message = {"type": "http.response.body", "body": events, "more_body": True}
                if not await within(STALLED, send(message)):
                    return
        except EventsGoneError:
            return  # a client that is too slow: its connection is closed in the middle of the answer
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def routes(recordings: Recordings) -> list[Route]:
    """GET and DELETE /v1/streams/ID."""
    return [
        Route("/v1/streams/{id}", partial(resume, recordings), methods=["GET"]),
        Route("/v1/streams/{id}", partial(end, recordings), methods=["DELETE"]),
    ]


async def resume(recordings: Recordings, request: Request) -> Response:
    """A stream's events starting at a number, buffered and future ones; status 204 if there are none left.

    The number is one more than the header Last-Event-ID or else the query's `from`; by default 0, the first event.
    Status 404 for an unknown stream, 410 if some of the events have been dropped.
    """
    recording = recordings.find(request.path_params["id"], request.scope.get(OWNER))
    if recording is None:
        return _unknown(request)
    number = _first_wanted(request)
    if number > recording.end:
        _wrong("from", number, whole_range(0, recording.end))
    if number == recording.end and recording.ended:
        return Response(status_code=204)  # tells a browser's EventSource not to reconnect
    try:
        return Follow(recording, recording.follow(number))
    except EventsGoneError as error:
        problem = f"events before {error.first} have been dropped; resume the stream with from={error.first}"
        return refusal(request.scope, Failure(410, problem, "events_expired", "from"))


async def end(recordings: Recordings, request: Request) -> Response:
    """Cancel a stream's answer, if it is running, and delete the recording."""
    recording = recordings.find(request.path_params["id"], request.scope.get(OWNER))
    if recording is None:
        return _unknown(request)
    recordings.forget(recording)
    return Response(status_code=204)


def _unknown(request: Request) -> Response:
    problem = "no stream has this id; it has expired, or was started on another server or with another API key"
    return refusal(request.scope, Failure(404, problem, "stream_not_found"))


def _first_wanted(request: Request) -> int:
    """The number of the first requested event. Raises FieldError."""
    last = request.headers.get("last-event-id", "")
    if last:
        return _number("Last-Event-ID", last) + 1
    return _number("from", request.query_params.get("from") or "0")


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        _wrong(name, text, whole_range(0, None))
    return int(text)


def _wrong(name: str, value: object, must: str) -> NoReturn:
    raise FieldError(f"{name} is {quoted(value)}; it must be {must}", name)
