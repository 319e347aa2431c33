"""Runs the application under uvicorn, from the first line on the terminal to the end of the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from socket import socket
from types import FrameType

import uvicorn

from npqwen.errors import OptionError
from npqwen.server.accepting import ConnectionLimit, raise_limit
from npqwen.server.app import application
from npqwen.server.connection import Connection
from npqwen.server.listener import Listener
from npqwen.server.models import Models
from npqwen.server.settings import Settings

SHUTDOWN_SECONDS = 10.0
"""Seconds that running answers have left after Ctrl-C or SIGTERM."""
LAST = 1.0
"""Seconds that answers have to end with an error before they are cancelled."""
IDLE_CONNECTION = 75
"""Seconds that an idle connection stays open: clients' connection pools expect about a minute."""
CROWDED_SECONDS = 60.0
"""Seconds between two lines in the log about too many connections."""
_log = logging.getLogger(__name__)
_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGBREAK] if sys.platform == "win32" else [])]  # type: ignore[attr-defined,unused-ignore]


def run(
    models: Models,
    settings: Settings,
    listener: Listener,
    tls: ssl.SSLContext | None,
    *,
    announce: Callable[[], None],
    notice: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C or SIGTERM; the first model is loaded at once.

    announce: called when clients can connect. notice(line): called with later messages for the user.

    After the signal, running answers have `SHUTDOWN_SECONDS` seconds; a second Ctrl-C ends them at once. Raises
    KeyboardInterrupt after Ctrl-C, OptionError if the address was taken meanwhile, and what loading the first model
    raises.
    """
    made = application(models, replace(settings, hosts=(*settings.hosts, *listener.names)))
    config = uvicorn.Config(
        made,
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",  # models are closed below, even if a second Ctrl-C skips the lifespan's shutdown
        timeout_keep_alive=IDLE_CONNECTION,
        timeout_graceful_shutdown=round(SHUTDOWN_SECONDS) + 2,
    )
    config.load()
    config.ssl = tls
    server = Server(config, announce)
    limit = ConnectionLimit(raise_limit(), server.make_room)
    for one in listener.sockets:
        one.limit = limit
    asyncio.run(_serve(server, models, [*listener.sockets], notice))
    if server.failure is not None:
        raise server.failure
    if server.interrupted:
        raise KeyboardInterrupt


class Server(uvicorn.Server):
    """Stops at the first signal and does not raise it again: the caller chooses the exit status."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce
        self.interrupted = False
        self.failure: BaseException | None = None
        self.stopping = asyncio.Event()
        self._crowded = -CROWDED_SECONDS  # when it was last logged that there are too many connections

    async def startup(self, sockets: list[socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:
            raise OptionError(f"cannot listen: {error.strerror or error}; choose another --port") from None
        if self.started:
            self._announce()

    def make_room(self) -> bool:
        """Close the connection that has been idle for longest, and log that once in a while; False if none is idle."""
        connections = self.server_state.connections
        now = time.monotonic()
        if now - self._crowded >= CROWDED_SECONDS:
            self._crowded = now
            _log.warning(
                "too many connections for 'ulimit -n': each new one ends the one that has been idle for longest, or is "
                "refused"
            )
        # uvicorn's limit_concurrency only refuses requests, once their headers are complete.
        idle = {one: one.idle_since for one in connections if isinstance(one, Connection)}
        since = {one: when for one, when in idle.items() if when is not None}
        if since:
            min(since, key=since.__getitem__).transport.abort()
        return bool(since)

    def stop(self) -> None:
        """End the server gracefully. Called in the event loop's thread."""
        self.should_exit = True
        self.stopping.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stop(number: int, frame: FrameType | None) -> None:
            self.force_exit = self.force_exit or (self.should_exit and number == signal.SIGINT)
            self.interrupted = self.interrupted or number == signal.SIGINT
            self.should_exit = True
            loop.call_soon_threadsafe(self.stopping.set)

        before = {number: signal.signal(number, stop) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


async def _serve(server: Server, models: Models, sockets: list[socket], notice: Callable[[str], None]) -> None:
    serving = asyncio.create_task(server.serve(sockets))
    stopping = asyncio.create_task(server.stopping.wait())
    loading = asyncio.create_task(_load_first(server, models))
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        if running := models.in_use:
            answers = "1 answer is" if running == 1 else f"{running} answers are"
            notice(f"stopping: {answers} running and may take {SHUTDOWN_SECONDS:.0f} s more; Ctrl-C ends them now")
        await asyncio.wait({serving}, timeout=SHUTDOWN_SECONDS)
        if not serving.done():
            await models.close()  # which ends streams with an error that their clients understand
    stopping.cancel()
    loading.cancel()
    try:
        await serving
    finally:
        # After a second Ctrl-C, uvicorn logs an error for each request that it cancels: the user knows.
        if server.force_exit:
            logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(models.close(), LAST if server.force_exit else None)
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=LAST)


async def _load_first(server: Server, models: Models) -> None:
    try:
        await models.worker(None, task=None)
    except Exception as error:
        server.failure = error
        server.stop()


def log_to_stderr(*, requests: bool) -> None:
    """Write warnings and errors of the server to stderr. requests: also write a line for each request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name in ("npqwen", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if requests and name == "npqwen" else logging.WARNING)
