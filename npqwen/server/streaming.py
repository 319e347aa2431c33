"""Responses to runs: streams with keepalives, and cancellation of a run whose client has disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from npqwen.chat.events import CallArguments, Reasoning, Text
from npqwen.server.failure import Failure, failure_of
from npqwen.server.run import Progress, RunEvent, Take

KEEPALIVE = 8.0
"""Seconds of silence after which a client gets a keepalive. Claude Code warns after 20, proxies give up after 60."""
STALLED = 120.0
"""Seconds after which a client that accepts no more bytes counts as gone."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of every stream: they keep proxies from buffering it."""

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete; nobody would read a response."""


class Events(Protocol):
    """A run, or several that were joined into one."""

    def cancel(self) -> None:
        """Cancel it."""

    async def for_each(self, take: Take) -> None:
        """Call take(index, event) for each event as it arrives; returns after the last one, or raises their error."""


class StreamFormat(Protocol):
    """How an API writes a run's events: each method returns the text to send, "" for nothing."""

    media_type: str

    def start(self) -> str:
        """The first event, a real one rather than a comment; it is sent before prefill."""

    def event(self, index: int, event: RunEvent) -> str:
        """The text for an event of choice `index`; adjacent pieces of text may have been joined."""

    def keepalive(self, progress: Progress | None) -> str:
        """An event without effect that every client parses, not a comment. progress: the latest, if any."""

    def error(self, failure: Failure) -> str:
        """An error and the end of the stream: `end` is not called after it."""

    def end(self) -> str:
        """The text that ends the stream after the run's last event."""


class StreamedRun(Response):
    """A response that sends a run's events as they arrive.

    Headers and the first event are sent at once, and a keepalive after every `KEEPALIVE` seconds of silence. The run is
    cancelled when the client disconnects. Events that a slow client has not read yet are merged, so that the backlog
    takes no more memory than the answer; a client that accepts nothing for `STALLED` seconds counts as disconnected.
    """

    def __init__(self, run: Events, format: StreamFormat, headers: Mapping[str, str] | None = None) -> None:
        self.status_code = 200
        self.media_type = format.media_type
        self.background = None
        self.init_headers({**HEADERS, **(headers or {})})
        self._run = run
        self._format = format
        self._pending: list[tuple[int, RunEvent]] = []
        self._newest: dict[int, int] = {}
        """By choice: the index of its last event in `_pending`."""
        self._ready = asyncio.Event()
        """Set when there is something to send, or a keepalive is due."""
        self._over = False
        """Whether all of the run's events have been read."""
        self._error: BaseException | None = None
        self._progress: Progress | None = None
        self._sending_since: float | None = None
        self._silent_since = 0.0
        self._silent = False
        """Whether a keepalive is due."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            while not writer.done() and not gone.done():
                await asyncio.wait({writer, gone}, timeout=STALLED / 4, return_when=asyncio.FIRST_COMPLETED)
                since = self._sending_since
                if since is not None and loop.time() - since > STALLED:
                    break
            if writer.done():
                writer.result()
        finally:
            if not self._over:
                self._run.cancel()
            await _end(reader, writer, gone)

    async def _read(self) -> None:
        try:
            await self._run.for_each(self._take)
        except Exception as error:
            self._error = error
        self._over = True
        self._ready.set()

    def _take(self, index: int, event: RunEvent) -> None:
        """Append an event to `_pending`, or merge it into the choice's last one; see `_joined`."""
        self._ready.set()
        if isinstance(event, Progress):
            self._progress = event
        at = self._newest.get(index)
        if at is not None:
            joined = _joined(self._pending[at][1], event)
            if joined is not None:
                self._pending[at] = index, joined
                return
        self._newest[index] = len(self._pending)
        self._pending.append((index, event))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send(send, self._format.start())
        self._silent_since = asyncio.get_running_loop().time()
        self._watch_silence()
        last = False
        try:
            while not last:
                await self._ready.wait()
                self._ready.clear()
                text, last = self._next_text()
                if text:
                    await self._send(send, text)
        finally:
            self._timer.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _watch_silence(self) -> None:
        """Wake the writer when it has been silent for `KEEPALIVE` seconds, and every `KEEPALIVE` seconds after that."""
        loop = asyncio.get_running_loop()
        due = self._silent_since + KEEPALIVE
        if due <= loop.time():
            self._silent = True
            self._ready.set()
            due = loop.time() + KEEPALIVE
        self._timer = loop.call_at(due, self._watch_silence)

    def _next_text(self) -> tuple[str, bool]:
        """The text to send now, and whether it is the last."""
        pending, self._pending, self._newest = self._pending, [], {}
        try:
            text = "".join([self._format.event(index, event) for index, event in pending])
            if self._over and self._error is None:
                return text + self._format.end(), True
        except Exception as error:
            text, self._error = "", error
        if self._error is not None:
            return text + self._format.error(failure_of(self._error)), True
        return text or (self._format.keepalive(self._progress) if self._silent else ""), False

    async def _send(self, send: Send, text: str) -> None:
        loop = asyncio.get_running_loop()
        self._sending_since = loop.time()
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        self._sending_since, self._silent_since, self._silent = None, loop.time(), False


def _joined(first: RunEvent, second: RunEvent) -> RunEvent | None:
    """Two adjacent events merged into one, if both are text of one kind, or progress; otherwise None."""
    if isinstance(first, Text) and isinstance(second, Text):
        return Text(first.text + second.text)
    if isinstance(first, Reasoning) and isinstance(second, Reasoning):
        return Reasoning(first.text + second.text)
    if isinstance(first, CallArguments) and isinstance(second, CallArguments) and first.index == second.index:
        return CallArguments(first.index, first.text + second.text)
    return second if isinstance(first, Progress) and isinstance(second, Progress) else None


async def until_disconnected(request: Request, results: Awaitable[Result], *runs: Events) -> Result:
    """Wait for the results of runs for a response that is not a stream; the request's body must have been read.

        replies = await until_disconnected(request, run.replies(), run)

    If the client disconnects first, or waiting fails otherwise, all `runs` are cancelled. Raises ClientGoneError in the
    first case, and what the runs raise.
    """
    waiting = asyncio.ensure_future(results)
    gone = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGoneError
        return waiting.result()
    except BaseException:
        for run in runs:
            run.cancel()
        raise
    finally:
        await _end(waiting, gone)


async def disconnected(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended; ignore what they raise."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
