"""The models that a server offers: found by name, loaded on demand, unloaded when idle or when memory is needed."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from npqwen.engine.budget import RESERVED
from npqwen.errors import ClosedError, NpqwenError, OptionError, OutOfMemoryError, QueueFullError
from npqwen.format.task import Task, check_task
from npqwen.hardware.machine import available_memory
from npqwen.server.adapter_worker import AdapterWorker
from npqwen.server.background import in_thread
from npqwen.server.exchange import current
from npqwen.server.model_names import ModelNames
from npqwen.server.offer import Offer
from npqwen.server.settings import KEEP_ALIVE, Settings
from npqwen.server.statistics import WorkerStatistics
from npqwen.server.worker import Worker
from npqwen.wording import size

if TYPE_CHECKING:
    from npqwen.model import Model

UNLOAD_SECONDS = 60.0
"""Seconds that a request waits for memory that models in use occupy."""
LEAST_SHARE = 4
"""Keys and values may take at least the memory divided by this, however large the weights are."""
POLL = 0.05
"""Seconds between checks whether a model has become idle, so that it can be unloaded to make room."""

_log = logging.getLogger(__name__)


class Models:
    """Finds the worker of a model.

    A model is in use while a request that got it from `worker` is being answered; a model in use is never unloaded.
    Call all methods in the event loop's thread.
    """

    def __init__(
        self,
        *models: Model | Offer,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.monotonic,
        available: Callable[[], int | None] = available_memory,
    ) -> None:
        """models: loaded models, which stay loaded and which the caller closes, and offers.

        clock: returns seconds. available: returns the bytes of memory that models may take, None if unknown; called
        once, here, unless the settings set a limit.
        """
        self._settings = settings or Settings()
        self._clock = clock
        slots = [
            _Slot(model) if isinstance(model, Offer) else _Slot(Offer.loaded(model), self._worker(model))
            for model in models
        ]
        if not slots:
            raise OptionError("there is no model to serve; give at least one")
        names = [slot.name for slot in slots]
        for name in names:
            if names.count(name) > 1:
                raise OptionError(f"two models are named {name}; serve one of them, or rename its directory")
        self._slots = {slot.name: slot for slot in slots}
        self._adapters = {f"{slot.name}:{name}": (slot, name) for slot in slots for name in slot.offer.adapters}
        adapters = {name: own for name, (_, own) in self._adapters.items()}
        self._names = ModelNames(names, self._settings.aliases, adapters)
        keep_alive = self._settings.keep_alive
        if keep_alive is None:
            keep_alive = KEEP_ALIVE if len(slots) > 1 else -1.0
        self._keep_alive = math.inf if keep_alive < 0 else keep_alive
        self._limit = self._settings.memory
        if self._limit is None:
            found = available()
            self._limit = None if found is None else max(0, found - RESERVED)
        self._share_memory()
        self._requests = 0
        self._loading = asyncio.Lock()
        self._changed = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def names(self) -> list[str]:
        """The names of the models and, after them, of models with an adapter; the first is the default."""
        return [*self._slots, *self._adapters]

    @property
    def states(self) -> list[ModelState]:
        """The state of every model."""
        return [self._state(slot) for slot in self._slots.values()]

    @property
    def offered(self) -> list[ModelState]:
        """The state of every model; and, as if each were a model, of those with adapters and of aliases without "*"."""
        return [self.state(name) for name in self.names] + [
            replace(self.state(alias), name=alias) for alias in self._names.aliases
        ]

    @property
    def in_use(self) -> int:
        """The number of HTTP requests that use a model or wait for one."""
        return self._requests

    def state(self, name: str | None) -> ModelState:
        """The state of one model. Raises what `worker` raises for its name."""
        found = self._names.find(name)
        return replace(self._state(self._slot(found)[0]), name=found)

    async def worker(
        self, name: str | None, keep_alive: float | None = None, task: Task | None = "text"
    ) -> Worker | AdapterWorker:
        """The worker of the named model, which is loaded if necessary; without a name, of the first model for the task.

        If the name is that of a model with an adapter, requests to the worker use the adapter.

        keep_alive: seconds that the model stays loaded after this request, negative: forever; None: the settings'
        value. task: the task that the request needs; None: any.

        Raises ModelNotFoundError for an unknown name, OptionError for a model with another task, QueueFullError if
        models in use occupy the memory, OutOfMemoryError if the model cannot fit, ClosedError after `close`, and what
        loading raises; after a failed load, the next request retries.
        """
        slot, adapter = self._find(name, task)
        if self._closed:
            raise ClosedError("the server is shutting down")
        slot.keep_alive = self._keep_alive if keep_alive is None else math.inf if keep_alive < 0 else keep_alive
        self._use(slot)
        slot.users += 1
        try:
            while slot.worker is None:
                if slot.loading is None:
                    slot.loading = asyncio.create_task(self._load(slot))
                    slot.loading.add_done_callback(_retrieve)
                await asyncio.shield(slot.loading)
        finally:
            slot.users -= 1
            self._touch(slot)
        self._sweep_later()
        return slot.worker if adapter is None else AdapterWorker(slot.worker, adapter)

    def _slot(self, name: str) -> tuple[_Slot, str | None]:
        """The model behind one of `names`, and the adapter's name or None."""
        return self._adapters.get(name) or (self._slots[name], None)

    def _find(self, name: str | None, task: Task | None) -> tuple[_Slot, str | None]:
        """The model and adapter for a name, checked to have the task; without a name, the first model for the task."""
        slot, adapter = self._slot(self._names.find(name))
        if task is None:
            return slot, adapter
        if not name:
            slot = next((one for one in self._slots.values() if one.offer.task == task), slot)
        check_task(slot.name, slot.offer.task, task)
        return slot, adapter

    async def unload(self, name: str | None) -> bool:
        """Unload a model now, or as soon as it is idle. Returns whether it is already unloaded."""
        slot, _ = self._slot(self._names.find(name))
        slot.keep_alive = 0.0
        self._touch(slot)
        if slot.can_unload():
            await self._unload(slot)
        self._sweep_later()
        return slot.worker is None

    async def sweep(self) -> float | None:
        """Unload idle models whose keep-alive time is over. Returns seconds until the next sweep is due, or None."""
        now = self._clock()
        for slot in self._slots.values():
            if slot.can_unload() and slot.expires <= now:
                await self._unload(slot)
                _log.info("unloaded %s: idle", slot.name)
        # A model that has expired but is in use is checked again when that use ends, or a second later.
        waits = [
            slot.expires - now if slot.expires > now else 1.0
            for slot in self._slots.values()
            if slot.can_expire and slot.worker is not None and not math.isinf(slot.expires)
        ]
        return min(waits, default=None)

    async def close(self) -> None:
        """Stop all workers, and close the models that were loaded here. Later requests raise ClosedError."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
        for slot in self._slots.values():
            if slot.worker is not None and slot.can_expire:
                await self._unload(slot)
            elif slot.worker is not None:
                await in_thread(slot.worker.close)

    def _use(self, slot: _Slot) -> None:
        """Keep a model in use until the end of the current HTTP request."""
        exchange = current.get()
        if exchange is None:
            return
        first = exchange.model is None
        exchange.model = slot.name
        slot.users += 1
        self._requests += first

        def release() -> None:
            slot.users -= 1
            self._requests -= first
            self._touch(slot)

        exchange.at_end.append(release)

    def _touch(self, slot: _Slot) -> None:
        slot.used = self._clock()
        self._changed.set()

    async def _load(self, slot: _Slot) -> None:
        try:
            async with self._loading:
                await self._make_room(slot)
                started = time.perf_counter()
                model = await in_thread(slot.offer.load)
            if self._closed:
                await in_thread(model.close)
                raise ClosedError("the server is shutting down")
            slot.worker = self._worker(model)
            self._share_memory()
            _log.info("loaded %s in %.1f s", slot.name, time.perf_counter() - started)
        except BaseException as error:
            if not isinstance(error, NpqwenError | asyncio.CancelledError):
                _log.error("%s cannot be loaded", slot.name, exc_info=error)
            raise
        finally:
            slot.loading = None

    async def _make_room(self, slot: _Slot) -> None:
        """Unload idle models, least recently used first, until this one fits; if none is idle, wait for one."""
        need = _needed(slot.offer)
        deadline = self._clock() + UNLOAD_SECONDS
        while self._limit is not None and (taken := self._taken()) + need > self._limit:
            loaded = [other for other in self._slots.values() if other.worker is not None]
            idle = [other for other in loaded if other.can_unload()]
            if idle:
                oldest = min(idle, key=lambda other: other.used)
                await self._unload(oldest)
                _log.info("unloaded %s to make room for %s", oldest.name, slot.name)
                continue
            if not any(other.can_expire for other in loaded):
                if self._settings.memory is None:
                    return  # weights are memory-mapped: pages that do not fit are reread from disk
                raise OutOfMemoryError(
                    f"{slot.name} needs {size(need)} of memory, but {size(max(0, self._limit - taken))} of the "
                    f"{size(self._limit)} for models are left; start the server with more --memory"
                )
            left = deadline - self._clock()
            if left <= 0:
                raise QueueFullError(
                    f"{slot.name} does not fit into memory beside the models that are in use; try again later",
                    retry_after=30,
                )
            await asyncio.sleep(min(left, POLL))

    def _taken(self) -> int:
        """Bytes of memory that the loaded models take; of idle ones without keys and values, which can be freed."""
        return sum(
            _needed(slot.offer) + (0 if slot.can_unload() else slot.worker.statistics.cache_bytes)
            for slot in self._slots.values()
            if slot.worker is not None
        )

    def _share_memory(self) -> None:
        """Limit the keys and values of every loaded model to an equal share of the memory that the weights leave."""
        loaded = [slot for slot in self._slots.values() if slot.worker is not None]
        if self._limit is None or not loaded:
            return
        left = self._limit - sum(_needed(slot.offer) for slot in loaded)
        # Weights are memory-mapped: if they fill the memory, the system evicts some pages for keys and values.
        share = max(left, self._limit // LEAST_SHARE) // len(loaded)
        for slot in loaded:
            assert slot.worker is not None
            slot.worker.limit(share)

    def _worker(self, model: Model) -> Worker:
        return Worker(model, queue_limit=self._settings.queue, parallel=self._settings.parallel)

    async def _unload(self, slot: _Slot) -> None:
        worker, slot.worker = slot.worker, None
        assert worker is not None
        slot.earlier = worker.statistics.plus(slot.earlier)

        def close() -> None:
            worker.close()
            worker.model.close()

        await in_thread(close)
        self._share_memory()

    def _sweep_later(self) -> None:
        """Start the task that runs `sweep` whenever a model may have expired, unless it is running."""
        if self._sweeper is None or self._sweeper.done():
            self._changed = asyncio.Event()  # bound to the running event loop, which differs between tests
            self._sweeper = asyncio.create_task(self._sweep_on())

    async def _sweep_on(self) -> None:
        while not self._closed:
            self._changed.clear()
            wait = await self.sweep()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)

    def _state(self, slot: _Slot) -> ModelState:
        statistics = WorkerStatistics(alive=True) if slot.worker is None else slot.worker.statistics
        expires = slot.worker is not None and slot.can_expire and not math.isinf(slot.expires)
        return ModelState(
            slot.name,
            slot.offer,
            slot.worker,
            slot.loading is not None,
            statistics.plus(slot.earlier),
            slot.expires - self._clock() if expires else None,
        )


class _Slot:
    """One model on offer, loaded or not."""

    def __init__(self, offer: Offer, worker: Worker | None = None) -> None:
        """worker: of a model that the caller has loaded; it is never unloaded."""
        self.name = offer.name
        self.offer = offer
        self.worker = worker
        self.can_expire = worker is None
        self.loading: asyncio.Task[None] | None = None
        self.users = 0
        """Requests that use it, or wait for it."""
        self.used = 0.0
        """When a request last began or ended using it, by the clock of `Models`."""
        self.keep_alive = math.inf
        self.earlier = WorkerStatistics()
        """Summed statistics of its workers that have ended."""

    @property
    def expires(self) -> float:
        return self.used + self.keep_alive

    def can_unload(self) -> bool:
        """Whether it can be unloaded: it is loaded, may expire, and is not in use."""
        if self.worker is None or not self.can_expire or self.users:
            return False
        statistics = self.worker.statistics
        return not statistics.running and not statistics.waiting


def _needed(offer: Offer) -> int:
    """Bytes of memory that a loaded model takes without keys and values."""
    return offer.loaded_bytes + RESERVED


def _retrieve(task: asyncio.Task[None]) -> None:
    """Retrieve a task's exception, so that asyncio does not log it: requests that await the task get it anyway."""
    if not task.cancelled():
        task.exception()


@dataclass(frozen=True)
class ModelState:
    """A snapshot of a model's state."""

    name: str
    offer: Offer
    worker: Worker | None
    """None: it is not loaded."""
    loading: bool
    statistics: WorkerStatistics
    """Sums since the server's start, including workers that have ended."""
    expires_in: float | None
    """Seconds until it is unloaded if it stays idle; None: it is not loaded, or stays loaded."""
