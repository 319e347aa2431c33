"""How many events of a stream are kept, and who waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from npqwen.server import recording
from npqwen.server.recording import EventsGoneError, Follower, Recording, Recordings

HEADERS = [(b"content-type", b"application/x-ndjson"), (b"x-other", b"1")]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "BYTES", 8)
    monkeypatch.setattr(recording, "PACE", 0.0)


def run(test: Callable[[Recording, Follower], Coroutine[Any, Any, None]]) -> None:
    """Run a test of a recording that has begun, and its first follower."""

    async def main() -> None:
        one = Recording(Recordings())
        follower = one.begin(HEADERS, None)
        assert follower is not None
        await asyncio.wait_for(test(one, follower), 20)

    asyncio.run(main())


def test_pieces_are_cut_into_events() -> None:
    async def test(one: Recording, follower: Follower) -> None:
        await one.add(b"a\nb", True)
        assert await one.take(follower) == b"a\n"
        await one.add(b"c", False)
        assert await one.take(follower) == b"bc\n"
        assert await one.take(follower) is None

    run(test)


def test_the_newest_follower_is_waited_for() -> None:
    async def test(one: Recording, follower: Follower) -> None:
        adding = asyncio.create_task(one.add(b"a\nb\nc\nd\ne\nf\n", True))
        await asyncio.sleep(0.01)
        assert not adding.done()
        assert await one.take(follower) == b"a\nb\nc\nd\ne\n"
        await adding
        assert await one.take(follower) == b"f\n"

    run(test)


def test_an_older_follower_is_not_waited_for() -> None:
    async def test(one: Recording, older: Follower) -> None:
        newest = one.follow(0)
        for _ in range(6):
            await one.add(b"a\n", True)
            await one.take(newest)
        with pytest.raises(EventsGoneError) as error:
            await one.take(older)
        assert error.value.first == 2
        one.leave(newest)
        one.leave(older)

    run(test)


def test_without_a_follower_the_oldest_events_go() -> None:
    async def test(one: Recording, follower: Follower) -> None:
        one.leave(follower)
        await one.add(b"a\nb\nc\nd\ne\nf\n", False)
        with pytest.raises(EventsGoneError):
            one.follow(1)
        assert await one.take(one.follow(2)) == b"c\nd\ne\nf\n"

    run(test)


def test_an_event_that_is_larger_than_the_limit_is_kept_alone() -> None:
    async def test(one: Recording, follower: Follower) -> None:
        one.leave(follower)
        await one.add(b"a\n" + 100 * b"b" + b"\n", True)
        assert await one.take(one.follow(1)) == 100 * b"b" + b"\n"

    run(test)


def test_without_a_follower_pieces_come_slowly_until_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PACE", 1000.0)

    async def test(one: Recording, follower: Follower) -> None:
        one.leave(follower)
        adding = asyncio.create_task(one.add(b"a\n", True))
        await asyncio.sleep(0.01)
        assert not adding.done()
        assert await one.take(one.follow(0)) == b"a\n"
        await adding

    run(test)


def test_only_streams_are_recorded_and_only_their_own_headers() -> None:
    async def main() -> None:
        one = Recording(Recordings())
        assert one.begin([(b"content-type", b"application/json")], None) is None
        assert one.begin(HEADERS, None) is not None
        assert one.headers == [HEADERS[0], (b"x-stream-id", one.id.encode())]

    asyncio.run(main())


@pytest.mark.parametrize("steps", range(5))
def test_an_answer_is_cancelled_while_it_is_paced(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However close to a change that ends the pause."""
    monkeypatch.setattr(recording, "PACE", 10.0)

    async def test(one: Recording, follower: Follower) -> None:
        one.leave(follower)
        adding = asyncio.create_task(one.add(b"a\n", True))
        await asyncio.sleep(0.01)
        one.close()
        for _ in range(steps):
            await asyncio.sleep(0)
        if adding.cancel():
            with pytest.raises(asyncio.CancelledError):
                await adding

    run(test)
