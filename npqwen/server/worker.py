"""A model that serves requests: their prompts are prepared here, and a dedicated thread runs them in batches."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from npqwen.checks import check_whole
from npqwen.engine.budget import RESERVED
from npqwen.engine.prefix_page import scope_of
from npqwen.errors import ClosedError, QueueFullError
from npqwen.format.task import check_task
from npqwen.generation.batch import PARALLEL, Batch
from npqwen.hardware.machine import available_memory
from npqwen.retrieval.reader import Reader
from npqwen.server.exchange import cache_salt
from npqwen.server.job import Job, prepare_choices
from npqwen.server.read_job import ReadJob
from npqwen.server.requests import ReadRequest, Request
from npqwen.server.run import Run
from npqwen.server.statistics import WorkerStatistics

if TYPE_CHECKING:
    from npqwen.model import Model
    from npqwen.server.run import RunEvent

    _Item = tuple[Run, tuple[int, RunEvent] | BaseException]

QUEUE = 64
"""Default limit of waiting requests."""
_LONGEST_RETRY = 60
"""Longest Retry-After in seconds."""

_log = logging.getLogger(__name__)


class Worker:
    """Runs the requests of one model. All methods but `start` may be called from any thread.

    One thread, the engine's, owns the batch, or the reader of an embedding model or reranker; other threads queue
    functions that it calls between two passes. The events of a pass are handed to each event loop in one call.
    """

    def __init__(
        self, model: Model, *, queue_limit: int = QUEUE, parallel: int = PARALLEL, memory: int | None = None
    ) -> None:
        """queue_limit: most requests that wait. parallel: most sequences that run at once. memory: bytes for keys and
        values; None: the machine's available memory less the weights.
        """
        self.model = model
        self._queue_limit = check_whole("queue", queue_limit, 1)
        driver = Batch if model.task == "text" else Reader
        self._driver = driver(model, parallel=check_whole("parallel", parallel, 1), memory=memory or _memory(model))
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: list[Job | ReadJob] = []
        self._outbox: list[_Item] = []
        self._starting: set[Request | ReadRequest] = set()
        """Requests that the engine's thread has not taken over yet."""
        self._requests = 0
        self._seconds = 1.0
        """A request's seconds from its arrival to its end: an exponential moving average."""
        self._closed = False
        self._closing = threading.Lock()
        """Held while `_closed` is set, and while a request is queued because it is not."""
        self._idle = True
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=f"npqwen-engine-{model.name}", daemon=True)
        self._thread.start()

    @property
    def statistics(self) -> WorkerStatistics:
        """A snapshot of its work, done and in progress."""
        driver = self._driver
        return WorkerStatistics(
            **vars(driver.statistics),
            waiting=self._waiting(),
            running=driver.running,
            requests=self._requests,
            heartbeat=time.monotonic() if self._idle else self._beat,
            alive=self._thread.is_alive(),
        )

    async def start(self, request: Request | ReadRequest, *, admitted: bool = False) -> Run:
        """Check a request, make the token ids of its prompt or texts, and queue it.

        admitted: it is a part of one that has been started, so it does not count against the limit of the queue.

        Raises OptionError and ContextLengthError for requests that are invalid, or that this model does not support,
        QueueFullError if too many wait, ClosedError after `close`.
        """
        if self._closed:
            raise ClosedError("the server is shutting down")
        waiting = 0 if admitted else self._waiting()
        if waiting >= self._queue_limit:
            seconds = self._seconds * (waiting + 1) / max(1, self._driver.running)
            raise QueueFullError(
                f"{waiting} requests are waiting already; try again later",
                retry_after=max(1, min(_LONGEST_RETRY, round(seconds))),
            )
        if not admitted:
            self._starting.add(request)
        try:
            job, choices, prompt_tokens = await asyncio.to_thread(self._prepare, request)
            job.admitted = admitted
            job.run = Run(choices, prompt_tokens, lambda run: self._calls.put(job.leave), job.progress)
            with self._closing:
                if self._closed:
                    raise ClosedError("the server is shutting down")
                self._calls.put(lambda: self._join(job, request))
        except BaseException:
            self._starting.discard(request)
            raise
        return job.run

    def close(self) -> None:
        """Stop the engine's thread after the pass in progress; running and waiting requests raise ClosedError."""
        with self._closing:
            self._closed = True
        self._calls.put(lambda: None)
        self._thread.join()

    def limit(self, memory: int) -> None:
        """Change the memory for keys and values, in bytes, starting with the next pass; it is at least one page's."""
        most = max(memory, self.model.new_cache(1).page_bytes)
        self._calls.put(lambda: self._driver.limit(most))

    def _waiting(self) -> int:
        """How many requests wait: none of their texts has begun."""
        return len(self._starting) + sum(job.waits for job in list(self._jobs))

    def _prepare(self, request: Request | ReadRequest) -> tuple[Job | ReadJob, int, int]:
        """A request's job, its number of choices, and the number of tokens of its prompt or texts."""
        if isinstance(request, ReadRequest):
            texts, salt = request.texts(self.model), cache_salt(None)
            if texts:  # here rather than in the engine's thread: reading files would stall other requests
                self.model.prefixes.fetch(texts[0][:-1], scope_of(None, salt))
            assert isinstance(self._driver, Reader)  # for a language model, `request.texts` has raised
            return ReadJob(texts, self._driver, self._post, salt), 1, sum(map(len, texts))
        check_task(self.model.name, self.model.task, "text")
        assert isinstance(self._driver, Batch)
        choices = prepare_choices(self.model, request)
        return Job(choices, self._driver, self._post), request.n, len(choices[0].sequence.decoding.prompt_ids)

    def _join(self, job: Job | ReadJob, request: Request | ReadRequest) -> None:
        self._starting.discard(request)
        self._requests += 1
        self._jobs.append(job)
        job.join()

    def _post(self, run: Run, item: tuple[int, RunEvent] | BaseException) -> None:
        self._outbox.append((run, item))

    def _work(self) -> None:
        driver, busy = self._driver, False
        while True:
            try:
                self._take_calls(wait=not busy)
                if self._closed:
                    self._take_calls(wait=False)  # requests that were queued just before `close` are ended, too
                    break
                self._beat = time.monotonic()
                busy = driver.step()
            except BaseException as error:
                _log.exception("the engine of %s failed; its requests are ended", self.model.name)
                driver.fail(error)
                busy = False
            self._deliver()
        driver.fail(ClosedError("the server is shutting down"))
        self._deliver()

    def _take_calls(self, wait: bool) -> None:
        """Call the functions that other threads have queued; wait: block until there is at least one."""
        with suppress(queue.Empty):
            if wait:
                self._idle = True
                call = self._calls.get()
                self._idle = False
                call()
            while True:
                self._calls.get_nowait()()

    def _deliver(self) -> None:
        """Hand the events of a step to the event loops of their runs."""
        for job in [job for job in self._jobs if job.seconds is not None]:
            self._jobs.remove(job)
            self._seconds += ((job.seconds or 0.0) - self._seconds) / 8
        outbox, self._outbox = self._outbox, []
        loops: dict[int, list[_Item]] = {}
        for run, item in outbox:
            loops.setdefault(id(run.loop), []).append((run, item))
        for items in loops.values():
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                items[0][0].loop.call_soon_threadsafe(_receive, items)


def _receive(items: list[_Item]) -> None:
    for run, item in items:
        run.receive(item)


def _memory(model: Model) -> int | None:
    """Bytes that keys and values may take: the available memory less the weights, at least one page's; or None."""
    available = available_memory()
    if available is None:
        return None
    return max(model.new_cache(1).page_bytes, available - model.weight_bytes - RESERVED)
