"""A run hands its events to one reader, those of before it came too, and nothing once it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from npqwen.chat.events import Text
from npqwen.errors import ClosedError
from npqwen.generation.completion import Completion, Usage
from npqwen.server.run import Completed, Run


def completed(text: str) -> Completed:
    usage = Usage(prompt_tokens=1, generated_tokens=1, prefill_seconds=0, first_token_seconds=0, decode_seconds=0)
    return Completed(Completion(text, [1], "stop", usage))


def run(test: Callable[[Run], Coroutine[Any, Any, None]], choices: int = 1) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(Run(choices, 1, lambda run: None)), 10)

    asyncio.run(main())


def test_the_reader_gets_all_events_in_order_early_ones_first() -> None:
    async def test(events: Run) -> None:
        found: list[Any] = []
        events.receive((1, Text("a")))
        events.receive((0, completed("x")))
        reading = asyncio.create_task(events.for_each(lambda index, event: found.append((index, event))))
        await asyncio.sleep(0)
        events.receive((1, Text("b")))
        assert [event for _, event in found] == [Text("a"), completed("x"), Text("b")]
        assert not reading.done()
        events.receive((1, completed("ab")))
        await reading
        assert [index for index, _ in found] == [1, 0, 1, 1]

    run(test, choices=2)


def test_an_error_comes_after_the_events_before_it() -> None:
    async def test(events: Run) -> None:
        found: list[Any] = []
        events.receive((0, Text("a")))
        events.receive(ClosedError("closed"))
        events.receive((0, Text("b")))
        with pytest.raises(ClosedError, match="closed"):
            await events.for_each(lambda index, event: found.append(event))
        assert found == [Text("a")]

    run(test)


def test_a_reader_that_fails_ends_the_run_with_its_error() -> None:
    async def test(events: Run) -> None:
        calls: list[Any] = []

        def fails(index: int, event: Any) -> None:
            calls.append(event)
            raise ZeroDivisionError

        reading = asyncio.create_task(events.for_each(fails))
        await asyncio.sleep(0)
        events.receive((0, Text("a")))
        events.receive((0, Text("b")))
        with pytest.raises(ZeroDivisionError):
            await reading
        assert calls == [Text("a")]

    run(test)


def test_nothing_comes_after_cancelling() -> None:
    async def test(events: Run) -> None:
        found: list[Any] = []
        reading = asyncio.create_task(events.for_each(lambda index, event: found.append(event)))
        await asyncio.sleep(0)
        events.cancel()
        events.receive((0, Text("a")))
        await reading
        assert found == []
        with pytest.raises(ClosedError, match="cancelled"):
            await events.results()

    run(test)


def test_a_reader_that_was_stopped_gets_nothing_more() -> None:
    async def test(events: Run) -> None:
        found: list[Any] = []
        reading = asyncio.create_task(events.for_each(lambda index, event: found.append(event)))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        events.receive((0, Text("a")))
        assert found == []

    run(test)
