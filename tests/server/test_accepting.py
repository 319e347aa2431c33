"""A server that more connections reach than it has file descriptors for."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import subprocess
import sys
from unittest import mock

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from npqwen.server.accepting import AcceptingSocket, ConnectionLimit
from npqwen.server.connection import Connection
from npqwen.server.listener import Listener
from npqwen.server.serving import Server

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="asyncio accepts in another way there")

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What comes back for a request."""
    writer.write(GET)
    return await asyncio.wait_for(reader.readuntil(b"done"), 30)


def test_half_open_connections_give_way_to_new_ones_and_running_requests_stay(caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()

    async def slow(_: object) -> PlainTextResponse:
        await release.wait()
        return PlainTextResponse("done")

    async def main() -> None:
        with Listener("127.0.0.1", 0, None) as listener:
            config = uvicorn.Config(
                Starlette(routes=[Route("/", slow)]), http=Connection, log_config=None, ws="none", lifespan="off"
            )
            server = Server(config, lambda: None)
            limit = listener.sockets[0].limit = ConnectionLimit(20, server.make_room)
            serving = asyncio.create_task(server.serve([*listener.sockets]))
            while not server.started:
                await asyncio.sleep(0.01)
            clients = [await asyncio.open_connection("127.0.0.1", listener.port)]
            running = asyncio.create_task(answered(*clients[0]))
            while not server.server_state.tasks:
                await asyncio.sleep(0.01)
            for _ in range(60):
                clients.append(await asyncio.open_connection("127.0.0.1", listener.port))
                assert len(limit.open) <= 21
            assert await asyncio.wait_for(clients[1][0].read(), 30) == b""  # the oldest without a request
            release.set()
            assert b" 200 OK" in await answered(*clients[-1])
            assert b" 200 OK" in await running
            for _, writer in clients:
                writer.close()
            server.stop()
            await serving
            assert not limit.open

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("too many connections")


def test_without_an_idle_connection_a_new_one_is_closed() -> None:
    with AcceptingSocket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.limit = ConnectionLimit(0, lambda: False)
        with socket.create_connection(listening.getsockname(), timeout=30) as client:
            with pytest.raises(BlockingIOError):
                listening.accept()
            assert client.recv(1) == b""


def test_after_a_failure_asyncio_does_not_try_again_at_once() -> None:
    with AcceptingSocket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        failure = OSError(errno.EMFILE, "Too many open files")
        with mock.patch("socket.socket.accept", side_effect=failure), pytest.raises(OSError, match="Too many"):
            listening.accept()
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.mark.parametrize(("soft", "hard", "most"), [(100, 160, 120), (160, 160, 120), (100, 400, 150)])
def test_the_limit_on_descriptors_is_raised_as_far_as_is_useful(soft: int, hard: int, most: int) -> None:
    code = (
        f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from npqwen.server import accepting\n"
        "accepting.ENOUGH = 200\n"
        "print(accepting.raise_limit(), r.getrlimit(r.RLIMIT_NOFILE))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == f"{most} ({most * 4 // 3}, {hard})\n"
