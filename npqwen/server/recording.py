"""Recorded streams: a ring buffer of each one's newest events, from which a client that lost its connection resumes."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from npqwen.errors import QueueFullError
from npqwen.server.time_limit import within

BYTES = 1_000_000
"""Most bytes of a stream's newest events that are buffered: about 5,000 pieces of text."""
COUNT = 64
"""The most streams that are kept at once."""
SECONDS = 120.0
"""How long a stream is kept, and its answer generated, without a client. A phone that changes networks needs less."""
PACE = 1.0
"""Seconds between two pieces of a stream without a client: text is joined meanwhile, so that it takes few events."""

_SEPARATORS = {"text/event-stream": b"\n\n", "application/x-ndjson": b"\n"}
"""What ends an event, by media type."""
_KEPT_HEADERS = (b"content-type", b"cache-control", b"x-accel-buffering", b"request-id")

Header = tuple[bytes, bytes]


class EventsGoneError(Exception):
    """The ring buffer has dropped events that a client requests. `first`: the number of the oldest one that it has."""

    def __init__(self, first: int) -> None:
        self.first = first


@dataclass(eq=False)
class Follower:
    """A client of a recording. number: the number of the next event that it gets."""

    number: int


class Recordings:
    """The streams that are kept, at most `COUNT`."""

    def __init__(self) -> None:
        self._all: dict[str, Recording] = {}

    def keep(self, recording: Recording) -> None:
        """Keep a recording. If `COUNT` are kept, evicts one that has ended and has no client; else QueueFullError."""
        if len(self._all) >= COUNT:
            idle = next((one for one in self._all.values() if one.ended and not one.followed), None)
            if idle is None:
                raise QueueFullError(f"{COUNT} resumable streams are running; try again later", retry_after=10)
            self.forget(idle)
        self._all[recording.id] = recording

    def find(self, id: str, owner: bytes | None) -> Recording | None:
        """The stream of this id, if it was started with the API key `owner`."""
        recording = self._all.get(id)
        if recording is None or not recording.begun.is_set():
            return None
        return recording if hmac.compare_digest(recording.owner or b"", owner or b"") else None

    def forget(self, recording: Recording) -> None:
        """Delete a stream; if it is running, its answer is cancelled."""
        self._all.pop(recording.id, None)
        recording.close()


class Recording:
    """One stream: `add` appends events, and any number of followers read them.

    Events are numbered from 0; a server-sent event has its number as its id. Call all methods in one event loop.
    """

    def __init__(self, recordings: Recordings) -> None:
        self.id = secrets.token_urlsafe(24)
        self.owner: bytes | None = None
        """The digest of the API key that it was started with."""
        self.headers: list[Header] = []
        self.begun = asyncio.Event()
        """Set when the response has begun and is a stream."""
        self.gone = asyncio.Event()
        """Set when no client wants the rest."""
        self.ended = False
        self._recordings = recordings
        self._separator = b""
        self._events: deque[bytes] = deque()
        self._bytes = 0
        self._first = 0
        self._partial = b""
        self._followers: list[Follower] = []
        self._news = asyncio.Event()
        """Set, and replaced, whenever something has changed."""
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def end(self) -> int:
        """The number that the next event will have."""
        return self._first + len(self._events)

    @property
    def followed(self) -> bool:
        """Whether it has a client."""
        return bool(self._followers)

    def begin(self, headers: Iterable[Header], owner: bytes | None) -> Follower | None:
        """Record a response with these headers; returns its first follower, or None if it is not a stream."""
        headers = list(headers)
        kind = dict(headers).get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind not in _SEPARATORS:
            return None
        self._separator = _SEPARATORS[kind]
        self.headers = [one for one in headers if one[0] in _KEPT_HEADERS]
        self.headers.append((b"x-stream-id", self.id.encode()))
        self.owner = owner
        self.begun.set()
        return self.follow(0)

    async def add(self, data: bytes, more: bool) -> None:
        """Append a piece of the body. more: whether more pieces follow.

        Backpressure: returns once the newest follower is at most `BYTES` behind; without a follower, after `PACE`
        seconds or when one joins.
        """
        *events, self._partial = (self._partial + data).split(self._separator)
        if not more and self._partial:
            events.append(self._partial)
        for event in events:
            await self._append(event)
        if not more:
            self.finish()
        self._tell()
        if not self._followers and not self.ended:
            await within(PACE, self._news.wait())

    def finish(self) -> None:
        """Mark the stream as complete."""
        self.ended = True
        self._tell()

    def follow(self, number: int) -> Follower:
        """Add a client, which gets the events starting at `number`. Raises EventsGoneError if some were dropped."""
        if number < self._first:
            raise EventsGoneError(self._first)
        if self._expiry is not None:
            self._expiry.cancel()
        follower = Follower(number)
        self._followers.append(follower)
        self._tell()
        return follower

    def leave(self, follower: Follower) -> None:
        """Remove a client that is done, or has disconnected. Without clients, the stream expires after `SECONDS`."""
        self._followers.remove(follower)
        self._tell()
        if not self._followers and not self.gone.is_set():
            self._expiry = asyncio.get_running_loop().call_later(SECONDS, self._recordings.forget, self)

    def close(self) -> None:
        """Cancel the answer and wake the followers. Called by `Recordings.forget`."""
        if self._expiry is not None:
            self._expiry.cancel()
        self.gone.set()
        self._tell()

    async def take(self, follower: Follower) -> bytes | None:
        """Wait for a follower's next events, and return them; None after the last one.

        Raises EventsGoneError if some of them have been dropped.
        """
        while follower.number >= self.end and not self.ended and not self.gone.is_set():
            await self._news.wait()
        if follower.number < self._first:
            raise EventsGoneError(self._first)
        events = list(self._events)[follower.number - self._first :]
        follower.number = max(follower.number, self.end)
        self._tell()
        return b"".join(events) if events else None

    async def _append(self, event: bytes) -> None:
        if self._separator == b"\n\n":
            event = b"id: %d\n%b" % (self.end, event)
        event += self._separator
        self._events.append(event)
        self._bytes += len(event)
        self._tell()
        while self._bytes > BYTES and len(self._events) > 1:
            if self._followers and self._followers[-1].number <= self._first and not self.gone.is_set():
                await self._news.wait()
                continue
            self._bytes -= len(self._events.popleft())
            self._first += 1

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
