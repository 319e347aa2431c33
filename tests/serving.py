"""A server in this process: an ASGI application on a free port of 127.0.0.1, and what tests see of its runs."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import uvicorn
from starlette.types import ASGIApp

from npqwen.server.app import application
from npqwen.server.connection import Connection
from npqwen.server.models import ModelState
from npqwen.server.offer import Offer
from npqwen.server.requests import Request
from npqwen.server.run import Run, RunEvent
from npqwen.server.settings import Settings
from npqwen.server.statistics import WorkerStatistics
from npqwen.server.worker import Worker

if TYPE_CHECKING:
    from npqwen.model import Model


@contextmanager
def served(application: ASGIApp) -> Iterator[str]:
    """Serve an application while the block runs; yields its address, "http://127.0.0.1:PORT"."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:  # see server/listener.py
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            application, http=Connection, log_config=None, ws="none", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), f"the server does not end:\n{_state(thread, server)}"


def _state(thread: threading.Thread, server: uvicorn.Server) -> str:
    """What a server's thread and its tasks are doing."""
    stack = traceback.format_stack(sys._current_frames()[thread.ident or 0])
    tasks = asyncio.all_tasks(server.servers[0].get_loop())
    return "".join(stack) + "\n".join(map(repr, tasks))


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Wait until a condition holds; AssertionError if it does not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@dataclass
class Runs:
    """The runs that servers of this process have started since the block began."""

    all: list[Run] = field(default_factory=list)

    @property
    def newest(self) -> Run:
        return self.all[-1]


@contextmanager
def scripted_server(model: Model, models: ScriptedModels | None = None) -> Iterator[tuple[ScriptedModels, str]]:
    """A server whose runs do what a test says, and its address. models: in place of new `ScriptedModels`."""
    models = models or ScriptedModels(model)
    with served(application(models, Settings())) as url:  # type: ignore[arg-type]
        yield models, url


@contextmanager
def watched_runs() -> Iterator[Runs]:
    """Note all runs that workers start."""
    runs = Runs()
    start = Worker.start

    async def noted(self: Worker, *args: Any, **options: Any) -> Run:
        run = await start(self, *args, **options)
        runs.all.append(run)
        return run

    with mock.patch.object(Worker, "start", noted):
        yield runs


class ScriptedModels:
    """One model on offer whose runs do what a test says: `put(event)`, from any thread.

    In the place of `npqwen.server.models.Models`, and of its own worker. requests: what was started. error: raised by
    `start`, if it is set. script: the events of runs that start, if they are known before.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.names = [model.name]
        self.requests: list[Request] = []
        self.runs: list[Run] = []
        self.error: Exception | None = None
        self.script: Sequence[RunEvent] = ()

    def put(self, *items: RunEvent | BaseException) -> None:
        """Deliver events of the newest run's first choice, or an error."""
        run = self.runs[-1]
        for item in items:
            run.loop.call_soon_threadsafe(run.receive, item if isinstance(item, BaseException) else (0, item))

    @property
    def states(self) -> list[ModelState]:
        """What is known of the model; its statistics are empty."""
        statistics = WorkerStatistics(alive=True)
        return [ModelState(self.model.name, Offer.loaded(self.model), None, False, statistics, None)]

    @property
    def offered(self) -> list[ModelState]:
        """See Models."""
        return self.states

    async def close(self) -> None:
        pass

    async def worker(
        self, name: str | None, keep_alive: float | None = None, task: str | None = None
    ) -> ScriptedModels:
        return self

    async def start(self, request: Request, *, admitted: bool = False) -> Run:
        if self.error is not None:
            raise self.error
        self.requests.append(request)
        self.runs.append(Run(request.n, 20, lambda run: None))
        self.put(*self.script)
        return self.runs[-1]
