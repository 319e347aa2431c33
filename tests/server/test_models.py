"""Several models: loaded when needed, once, within the memory budget; unloaded when idle, never while in use."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from starlette.types import Receive, Scope, Send

import npqwen
from npqwen.engine.budget import RESERVED
from npqwen.errors import (
    CheckpointError,
    ClosedError,
    ModelNotFoundError,
    OptionError,
    OutOfMemoryError,
    QueueFullError,
)
from npqwen.server import app
from npqwen.server.exchange import Exchanges
from npqwen.server.models import Models
from npqwen.server.offer import Offer
from npqwen.server.requests import TextRequest
from npqwen.server.settings import Settings

Result = TypeVar("Result")


class Clock:
    """Seconds that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Shelf:
    """Offers of the example model under several names. loads: of which names, in order. gate: loading waits for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loads: list[str] = []
        self.models: dict[str, npqwen.Model] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.weights = Offer.of(path, "any").weight_bytes

    def offer(self, name: str) -> Offer:
        made = Offer.of(self.path, name, threads=1)

        def load() -> npqwen.Model:
            self.loads.append(name)
            self.gate.wait(30)
            if self.error is not None:
                raise self.error
            self.models[name] = made.load()
            return self.models[name]

        return replace(made, load=load)

    def offers(self, *names: str) -> list[Offer]:
        return [self.offer(name) for name in names]

    def room(self, count: int) -> int:
        """Bytes for so many models, and a little less than one more."""
        return (count + 1) * (self.weights + RESERVED) - 1


@pytest.fixture
def shelf(tiny: Callable[[int], Path]) -> Shelf:
    return Shelf(tiny(4))


def models(shelf: Shelf, *names: str, clock: Clock | None = None, **settings: Any) -> Models:
    return Models(*shelf.offers(*names), settings=Settings(**settings), clock=clock or Clock())


def running(models: Models, body: Callable[[], Awaitable[Result]]) -> Result:
    """What `body` returns, and the models closed."""

    async def main() -> Result:
        try:
            return await body()
        finally:
            await models.close()

    return asyncio.run(main())


@asynccontextmanager
async def in_use(models: Models, name: str, keep_alive: float | None = None) -> AsyncIterator[None]:
    """A request that uses a model, from when the model is there until the block ends."""
    there, end = asyncio.Event(), asyncio.Event()

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await models.worker(name, keep_alive)
        there.set()
        await end.wait()

    async def nothing(*_: object) -> Any:
        raise AssertionError

    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    task = asyncio.create_task(Exchanges(handler)(scope, nothing, nothing))
    waiting = asyncio.create_task(there.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        if task.done():
            task.result()
        yield
    finally:
        end.set()
        await task


def loaded(models: Models) -> list[str]:
    return [state.name for state in models.states if state.worker is not None]


def test_a_model_is_loaded_when_a_request_names_it_and_only_once(shelf: Shelf) -> None:
    several = models(shelf, "a", "b")

    async def body() -> None:
        assert loaded(several) == []
        shelf.gate.clear()
        waiting = [asyncio.create_task(several.worker("b")) for _ in range(5)]
        while not shelf.loads:
            await asyncio.sleep(0.001)  # the loop runs while a thread loads
        assert [state.loading for state in several.states] == [False, True]
        shelf.gate.set()
        workers = await asyncio.gather(*waiting)
        assert len({id(worker) for worker in workers}) == 1
        assert await several.worker("b") is workers[0]
        assert await several.worker(None) is not workers[0]  # the first one
        assert shelf.loads == ["b", "a"]

    running(several, body)


def test_a_request_that_gives_up_does_not_stop_the_loading_for_others(shelf: Shelf) -> None:
    one = models(shelf, "a")

    async def body() -> None:
        shelf.gate.clear()
        first, second = (asyncio.create_task(one.worker("a")) for _ in range(2))
        while not shelf.loads:
            await asyncio.sleep(0.001)
        first.cancel()
        await asyncio.sleep(0)
        shelf.gate.set()
        assert (await second).model is shelf.models["a"]
        assert shelf.loads == ["a"]

    running(one, body)


def test_a_model_that_cannot_be_loaded_is_tried_again_by_the_next_request(shelf: Shelf) -> None:
    one = models(shelf, "a")

    async def body() -> None:
        shelf.error = CheckpointError("config.json is damaged")
        for _ in range(2):
            with pytest.raises(CheckpointError, match="is damaged"):
                await one.worker("a")
        shelf.error = None
        await one.worker("a")
        assert shelf.loads == ["a"] * 3

    running(one, body)


def test_the_least_recently_used_model_is_unloaded_for_another(shelf: Shelf) -> None:
    clock = Clock()
    several = models(shelf, "a", "b", "c", clock=clock, memory=shelf.room(2))

    async def body() -> None:
        for name in ("a", "b", "a", "c"):
            clock.now += 1
            await several.worker(name)
        assert loaded(several) == ["a", "c"]
        with pytest.raises(ClosedError):
            shelf.models["b"].logits([1])
        clock.now += 1
        await several.worker("b")
        assert loaded(several) == ["b", "c"]

    running(several, body)


def test_a_model_in_use_is_not_unloaded_and_the_request_waits_for_it(shelf: Shelf) -> None:
    several = models(shelf, "a", "b", memory=shelf.room(1))

    async def body() -> None:
        async with in_use(several, "a"):
            waiting = asyncio.create_task(several.worker("b"))
            await asyncio.sleep(0.15)
            assert loaded(several) == ["a"]
            assert not waiting.done()
        await waiting
        assert loaded(several) == ["b"]

    running(several, body)


def test_a_request_that_waits_too_long_for_memory_is_told_to_try_later(shelf: Shelf) -> None:
    ticks = itertools.count(0, 7.0)
    several = Models(
        *shelf.offers("a", "b"), settings=Settings(memory=shelf.room(1)), clock=lambda: float(next(ticks))
    )

    async def body() -> None:
        async with in_use(several, "a"):
            with pytest.raises(QueueFullError, match="in use") as error:
                await several.worker("b")
            assert error.value.retry_after > 0
        await several.worker("b")

    running(several, body)


def test_each_request_counts_once_as_using_a_model_and_loading_one_ahead_does_not(shelf: Shelf) -> None:
    several = models(shelf, "a", "b")

    async def asked() -> None:
        async with in_use(several, "a"):
            assert several.in_use == 1

    async def body() -> None:
        shelf.gate.clear()
        loading = asyncio.create_task(several.worker("a"))
        await asyncio.sleep(0.1)
        assert shelf.loads == ["a"]
        assert several.in_use == 0
        asking = asyncio.create_task(asked())
        await asyncio.sleep(0.1)
        assert several.in_use == 1
        shelf.gate.set()
        await asyncio.gather(loading, asking)
        assert several.in_use == 0
        async with in_use(several, "a"), in_use(several, "b"):
            assert several.in_use == 2

    running(several, body)


def test_a_model_that_generates_is_in_use(shelf: Shelf) -> None:
    clock = Clock()
    one = models(shelf, "a", clock=clock, keep_alive=10.0)

    async def body() -> None:
        worker = await one.worker("a")
        swept = threading.Event()

        def wait(ids: list[int], logits: object) -> None:
            swept.wait(60)

        run = await worker.start(TextRequest("Once", {"max_tokens": 2, "temperature": 0, "logits_processor": wait}))
        clock.now += 100
        while not worker.statistics.running:
            await asyncio.sleep(0.0001)
        await one.sweep()
        assert loaded(one) == ["a"]
        swept.set()
        await run.completions()
        while worker.statistics.running:
            await asyncio.sleep(0.001)
        await one.sweep()
        assert loaded(one) == []

    running(one, body)


def test_more_memory_than_the_server_may_use_is_refused(shelf: Shelf) -> None:
    one = models(shelf, "a", memory=1000)

    async def body() -> None:
        with pytest.raises(OutOfMemoryError, match=r"a needs 17. MB of memory, but 1 kB of the 1 kB"):
            await one.worker("a")
        assert shelf.loads == []

    running(one, body)


def test_without_a_limit_one_model_may_exceed_the_available_memory(shelf: Shelf) -> None:
    several = Models(*shelf.offers("a", "b"), available=lambda: 1000)

    async def body() -> None:
        await several.worker("a")
        await several.worker("b")
        assert loaded(several) == ["b"]

    running(several, body)


def test_an_idle_model_is_unloaded_after_a_while(shelf: Shelf) -> None:
    clock = Clock()
    several = models(shelf, "a", "b", clock=clock)

    async def body() -> None:
        await several.worker("a")
        clock.now += 200
        await several.worker("b")
        assert await several.sweep() == 100
        clock.now += 99
        await several.sweep()
        assert loaded(several) == ["a", "b"]
        clock.now += 1
        assert await several.sweep() == 200
        assert loaded(several) == ["b"]
        async with in_use(several, "b"):
            clock.now += 1000
            await several.sweep()
            assert loaded(several) == ["b"]
        assert await several.sweep() == 300  # from the end of its use on

    running(several, body)


def test_idle_models_go_by_themselves(shelf: Shelf) -> None:
    several = Models(*shelf.offers("a", "b"), settings=Settings(keep_alive=0.05))

    async def body() -> None:
        async with in_use(several, "a"):
            await asyncio.sleep(0.1)
            assert loaded(several) == ["a"]
        end = time.monotonic() + 20
        while loaded(several):
            assert time.monotonic() < end
            await asyncio.sleep(0.005)

    running(several, body)


def test_a_single_model_stays_unless_it_is_told_otherwise(shelf: Shelf) -> None:
    clock = Clock()
    one = models(shelf, "a", clock=clock)

    async def body() -> None:
        await one.worker("a")
        clock.now += 1e6
        assert await one.sweep() is None
        assert loaded(one) == ["a"]
        await one.worker("a", keep_alive=60)
        assert await one.sweep() == 60
        await one.worker("a", keep_alive=-1)
        assert await one.sweep() is None
        await one.worker("a")  # the next request without a time has the server's own
        assert await one.sweep() is None
        assert await one.unload("a")
        assert loaded(one) == []

    running(one, body)


def test_unloading_a_model_in_use_waits_for_the_end_of_that(shelf: Shelf) -> None:
    one = models(shelf, "a")

    async def body() -> None:
        async with in_use(one, "a"):
            assert not await one.unload("a")
            assert loaded(one) == ["a"]
        await one.sweep()
        assert loaded(one) == []

    running(one, body)


def test_a_model_that_the_caller_loaded_stays_and_is_not_closed(tiny: Callable[[int], Path], shelf: Shelf) -> None:
    with npqwen.load(tiny(4), threads=1) as own:
        both = Models(own, shelf.offer("b"), settings=Settings(memory=shelf.room(1)), clock=Clock())

        async def body() -> None:
            assert not await both.unload(own.name)
            with pytest.raises(OutOfMemoryError):
                await both.worker("b")

        running(both, body)
        assert own.logits([1]).shape[0] == 1


def test_closing_ends_the_models_that_were_loaded_here(shelf: Shelf) -> None:
    several = models(shelf, "a", "b")

    async def body() -> None:
        await several.worker("a")

    running(several, body)
    with pytest.raises(ClosedError):
        shelf.models["a"].logits([1])

    async def late() -> None:
        with pytest.raises(ClosedError, match="shutting down"):
            await several.worker("a")

    asyncio.run(late())


def test_a_model_that_is_loaded_while_the_server_closes_is_closed(shelf: Shelf) -> None:
    one = models(shelf, "a")

    async def body() -> None:
        shelf.gate.clear()
        waiting = asyncio.create_task(one.worker("a"))
        while not shelf.loads:
            await asyncio.sleep(0.001)
        await one.close()
        shelf.gate.set()
        with pytest.raises(ClosedError):
            await waiting
        with pytest.raises(ClosedError):
            shelf.models["a"].logits([1])

    asyncio.run(body())


def test_sums_of_work_survive_their_model(shelf: Shelf) -> None:
    one = models(shelf, "a")

    async def body() -> None:
        for _ in range(2):
            worker = await one.worker("a")
            await (await worker.start(TextRequest("Once", {"max_tokens": 3}))).completions()
            while not await one.unload("a"):  # the engine's thread may not have noted the end yet
                await asyncio.sleep(0.001)
        assert shelf.loads == ["a", "a"]
        assert one.states[0].statistics.generated_tokens == 6

    running(one, body)


def test_keys_and_values_make_room_for_another_model(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npqwen.server.models.LEAST_SHARE", 1 << 40)
    with npqwen.load(shelf.path, threads=1) as model:
        page = model.new_cache(1).page_bytes
    several = models(shelf, "a", "b", memory=2 * (shelf.weights + RESERVED) + 5 * page)

    async def body() -> None:
        worker = await several.worker("a")
        for start in ("one ", "two ", "three "):
            await (await worker.start(TextRequest(start * 300, {"max_tokens": 1}))).completions()
        assert worker.statistics.cache_bytes >= 6 * page  # two pages and more of each prompt, kept for the next one
        await several.worker("b")
        end = time.monotonic() + 20
        while worker.statistics.cache_bytes > 2.5 * page:  # half of what is left
            assert time.monotonic() < end
            await asyncio.sleep(0.001)
        assert loaded(several) == ["a", "b"]

    running(several, body)


def test_names_that_cannot_be_served(shelf: Shelf) -> None:
    with pytest.raises(OptionError, match="no model to serve"):
        app()
    with pytest.raises(OptionError, match="two models are named a"):
        Models(*shelf.offers("a", "b", "a"))
    with pytest.raises(ModelNotFoundError, match="there are a, b"):
        models(shelf, "a", "b").state("c")


def test_a_draft_model_with_other_tokens_is_refused_before_anything_is_loaded(
    tiny: Callable[[int], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny(4), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert Offer.of(tiny(16), "a", draft=tiny(4)).draft == tiny(4)
    with pytest.raises(OptionError, match="the draft model other has other tokens than a; choose"):
        Offer.of(tiny(16), "a", draft=other)
