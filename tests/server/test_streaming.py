"""Streams that never fall silent, and runs that end with their clients: on an ASGI interface made by hand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.requests import Request

from npqwen.chat.events import Text
from npqwen.errors import ClosedError, QueueFullError
from npqwen.server import streaming
from npqwen.server.failure import Failure
from npqwen.server.run import Progress, RunEvent, Take
from npqwen.server.streaming import ClientGoneError, StreamedRun, until_disconnected


class FakeRun:
    """A run whose events a test puts in."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[RunEvent | BaseException | None] = asyncio.Queue()
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def put(self, *events: RunEvent | BaseException | None) -> None:
        for event in events:
            self.queue.put_nowait(event)

    async def for_each(self, take: Take) -> None:
        while (event := await self.queue.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            take(0, event)

    async def result(self) -> str:
        texts: list[str] = []
        await self.for_each(lambda index, event: texts.append(event.text if isinstance(event, Text) else ""))
        return "".join(texts)


class Plain:
    """A format that can be read in a test."""

    media_type = "text/plain"

    def start(self) -> str:
        return "start|"

    def event(self, index: int, event: RunEvent) -> str:
        if isinstance(event, Text) and event.text == "bug":
            raise ZeroDivisionError
        return f"{event.text}|" if isinstance(event, Text) else ""

    def keepalive(self, progress: Progress | None) -> str:
        return f"alive {progress.done if progress else '-'}|"

    def error(self, failure: Failure) -> str:
        return f"error {failure.status} {failure.message}|"

    def end(self) -> str:
        return "end|"


class Client:
    """The other side of an ASGI response: what was sent, and when it goes."""

    def __init__(self) -> None:
        self.status = 0
        self.pieces: list[str] = []
        self.complete = False
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["body"]:
            self.pieces.append(message["body"].decode())
        self.complete |= message["type"] == "http.response.body" and not message["more_body"]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.001)


def run(test: Callable[[FakeRun, Client], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(FakeRun(), Client()), 20)

    asyncio.run(main())


def respond(events: FakeRun, client: Client) -> asyncio.Task[None]:
    return asyncio.create_task(StreamedRun(events, Plain())({"type": "http"}, client.receive, client.send))


def test_the_first_event_is_sent_before_the_run_has_any() -> None:
    async def test(events: FakeRun, client: Client) -> None:
        response = respond(events, client)
        await client.until(lambda: bool(client.pieces))
        assert (client.status, client.pieces) == (200, ["start|"])
        events.put(Text("a"), None)
        await response
        assert (client.pieces, client.complete) == (["start|", "a|end|"], True)
        assert not events.cancelled

    run(test)


def test_text_that_is_ready_at_the_same_time_is_one_piece() -> None:
    async def test(events: FakeRun, client: Client) -> None:
        events.put(Text("a"), Text("b"), Progress(1, 2, 0), Text("c"), None)
        await respond(events, client)
        assert "".join(client.pieces) == "start|ab|c|end|"

    run(test)


def test_silence_is_broken_by_keepalives_also_while_events_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEPALIVE", 0.05)

    async def test(events: FakeRun, client: Client) -> None:
        response = respond(events, client)
        await client.until(lambda: "alive -|" in client.pieces)
        for done in range(200):
            events.put(Progress(done, 200, 0))
            await asyncio.sleep(0.001)
            if any(piece.startswith("alive") and piece != "alive -|" for piece in client.pieces):
                break
        else:
            raise AssertionError("events without text kept the stream silent")
        events.put(None)
        await response
        assert client.pieces[-1] == "end|"

    run(test)


def test_an_error_in_the_middle_ends_the_stream_in_the_formats_shape() -> None:
    async def test(events: FakeRun, client: Client) -> None:
        events.put(Text("a"), QueueFullError("too many", 5))
        await respond(events, client)
        assert "".join(client.pieces) == "start|a|error 503 too many|"
        assert client.complete

    run(test)


def test_a_bug_in_the_middle_is_logged_and_cancels_the_run(caplog: pytest.LogCaptureFixture) -> None:
    async def test(events: FakeRun, client: Client) -> None:
        events.put(Text("bug"))
        await respond(events, client)
        assert client.pieces[1:] == ["error 500 internal error; the server's log has the details|"]
        assert events.cancelled

    with caplog.at_level(logging.ERROR):
        run(test)
    assert "ZeroDivisionError" in caplog.text


def test_a_run_ends_with_its_client_before_the_next_event() -> None:
    async def test(events: FakeRun, client: Client) -> None:
        response = respond(events, client)
        await client.until(lambda: bool(client.pieces))
        client.gone.set()
        await response
        assert events.cancelled

    run(test)


def test_a_client_that_accepts_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STALLED", 0.1)

    async def test(events: FakeRun, client: Client) -> None:
        response = respond(events, client)
        await client.until(lambda: bool(client.pieces))
        client.reads.clear()
        events.put(Text("a"))
        await response
        assert events.cancelled
        assert not client.complete

    run(test)


def test_what_a_slow_client_has_not_read_becomes_one_piece() -> None:
    async def test(events: FakeRun, client: Client) -> None:
        response = respond(events, client)
        await client.until(lambda: bool(client.pieces))
        client.reads.clear()
        for _ in range(1000):
            events.put(Text("a"))
            await asyncio.sleep(0)
        client.reads.set()
        events.put(None)
        await response
        assert "".join(client.pieces).replace("|", "") == "start" + 1000 * "a" + "end"
        assert len(client.pieces) < 5

    run(test)


def request(client: Client) -> Request:
    return Request({"type": "http", "method": "POST", "headers": []}, client.receive)


def test_an_answer_in_one_piece_is_waited_for() -> None:
    async def test(events: FakeRun, client: Client) -> None:
        events.put(Text("a"), Text("b"), None)
        assert await until_disconnected(request(client), events.result(), events) == "ab"
        assert not events.cancelled

    run(test)


def test_an_answer_in_one_piece_ends_with_its_client() -> None:
    async def test(events: FakeRun, client: Client) -> None:
        asyncio.get_running_loop().call_later(0.01, client.gone.set)
        with pytest.raises(ClientGoneError):
            await until_disconnected(request(client), events.result(), events)
        assert events.cancelled

    run(test)


def test_an_error_of_one_run_cancels_the_others() -> None:
    async def test(events: FakeRun, client: Client) -> None:
        events.put(ClosedError("closed"))
        other = FakeRun()
        with pytest.raises(ClosedError):
            await until_disconnected(request(client), events.result(), events, other)
        assert other.cancelled

    run(test)
