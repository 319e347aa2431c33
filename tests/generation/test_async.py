"""`async for` over streams: the same text, a loop that keeps running, and tasks that are cancelled."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reciter import recite

from npqwen.chat.events import Reply
from npqwen.errors import OptionError
from npqwen.generation.async_iteration import AsyncSteps
from npqwen.generation.completion import Completion
from npqwen.generation.generate import stream
from npqwen.generation.session import Session
from npqwen.generation.stream import Stream
from npqwen.model import Model, load

SUM = "<|im_start|>user\nWhat is {} + {}?<|im_end|>\n<|im_start|>assistant\n"
LONG = "1234567890" * 20


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with load(tiny(4), threads=2) as loaded:
        yield loaded


async def read(pieces: Stream) -> str:
    return "".join([piece async for piece in pieces])


def test_many_at_once_give_what_each_gives_alone_and_the_loop_goes_round(model: Model) -> None:
    prompts = [SUM.format(a, b) for a, b in ((17, 25), (3, 4), (40, 9))]
    alone = [model.generate(prompt, temperature=0).text for prompt in prompts]

    async def main() -> tuple[list[str], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        texts = await asyncio.gather(*(read(model.stream(prompt, temperature=0)) for prompt in prompts))
        ticking.cancel()
        return list(texts), ticks

    texts, ticks = asyncio.run(main())
    assert texts == alone
    assert ticks > 50


def test_awaiting_gives_the_whole(model: Model) -> None:
    prompt, question = SUM.format(17, 25), [{"role": "user", "content": "17 + 25?"}]
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 30}

    async def main() -> tuple[Completion, Reply]:
        return (
            await model.stream(prompt, **options),
            await model.stream_chat(question, thinking=False, **options),
        )

    text, reply = asyncio.run(main())
    assert text.text == model.generate(prompt, **options).text
    assert reply.text == model.chat(question, thinking=False, **options).text


class Gate:
    """A logits_processor that waits in the step of the given number until it is let through."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self, ids: list[int], logits: np.ndarray) -> None:
        self.calls += 1
        if self.calls == self.step:
            self.inside.set()
            assert self.go_on.wait(60)


def test_a_cancelled_task_ends_the_stream_after_the_pass_under_way() -> None:
    gate = Gate(step=3)
    pieces = stream(recite(LONG), "x", logits_processor=gate)

    async def main() -> None:
        task = asyncio.ensure_future(read(pieces))
        await asyncio.to_thread(gate.inside.wait, 60)
        for _ in range(3):  # also one that insists
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()  # the step cannot be interrupted
        gate.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert pieces.text == "123"
    assert pieces.finish_reason is None
    assert list(pieces) == []
    assert gate.calls == 3


def test_a_cancelled_task_leaves_a_session_usable_and_ends_a_long_prompt_early(model: Model) -> None:
    session = Session(model)
    ids = model.tokenizer.encode("A river is a stream of water. " * 150)
    assert len(ids) > 4 * model.chunk
    read_so_far: list[int] = []
    pieces = session.stream(ids, progress=lambda done, total: read_so_far.append(done))

    async def main() -> None:
        task = asyncio.ensure_future(read(pieces))
        while not read_so_far:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert session.ids == ids
    assert 0 < session.cache.length < len(ids)
    done = session.stream(ids[:300], temperature=0, max_tokens=4).completion()
    assert done.ids == Stream(model, ids[:300], temperature=0, max_tokens=4).completion().ids


def test_a_timeout_cancels() -> None:
    gate = Gate(step=2)
    pieces = stream(recite(LONG), "x", logits_processor=gate)

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.1, gate.go_on.set)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(read(pieces), 0.02)

    asyncio.run(main())
    assert pieces.text == "12"


def test_errors_come_through() -> None:
    def failing(ids: list[int], logits: np.ndarray) -> None:
        if len(ids) > 3:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        asyncio.run(read(stream(recite(LONG), "x", logits_processor=failing)))


def test_leaving_early_closes_with_aclosing_and_the_rest_can_be_read_without() -> None:
    async def first(pieces: Stream, closing: bool) -> str:
        if not closing:
            async for piece in pieces:
                return piece
        async with aclosing(pieces):
            async for piece in pieces:
                return piece
        raise AssertionError

    closed, kept = stream(recite("1234"), "x"), stream(recite("1234"), "x")
    assert asyncio.run(first(closed, closing=True)) == asyncio.run(first(kept, closing=False)) == "1"
    assert list(closed) == []
    assert "".join(kept) == "234"


def test_a_stream_that_another_thread_runs_is_not_closed_but_can_be_cancelled() -> None:
    gate = Gate(step=2)
    pieces = stream(recite(LONG), "x", logits_processor=gate)
    thread = threading.Thread(target=lambda: list(pieces))
    thread.start()
    assert gate.inside.wait(60)
    with pytest.raises(OptionError, match=r"another thread is running this stream; cancel\(\) ends it"):
        pieces.close()
    with pytest.raises(OptionError, match="another thread is running this stream; give each thread its own"):
        next(pieces)
    pieces.cancel()
    gate.go_on.set()
    thread.join(60)
    assert pieces.text == "12"


class Slow(AsyncSteps[int]):
    """Steps of 20 ms; the third fails if `failing`."""

    def __init__(self, failing: bool = False) -> None:
        self.begun = self.done = 0
        self.cancelled = self.closed = False
        self.failing = failing

    def __next__(self) -> int:
        if self.cancelled or self.done == 5:
            raise StopIteration
        self.begun += 1
        time.sleep(0.02)
        self.done += 1
        if self.failing and self.done == 3:
            raise OSError("failed")
        return self.done

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("failing", [False, True])
def test_cancelling_any_iterator_waits_for_its_step_and_closes_it(failing: bool) -> None:
    steps = Slow(failing)
    seen: list[Any] = []

    async def reading() -> None:
        async for step in steps:
            seen.append(step)

    async def main() -> None:
        task = asyncio.ensure_future(reading())
        while steps.begun < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps.closed
        assert steps.cancelled

    asyncio.run(main())
    assert steps.done == 3
    assert seen[:1] == [1]
