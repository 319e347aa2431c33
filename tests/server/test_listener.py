"""The sockets that a server listens on."""

from __future__ import annotations

import asyncio
import socket

from npqwen.server.listener import Listener


def test_small_pieces_are_sent_at_once() -> None:
    """Otherwise TCP holds a second small piece back until the first is acknowledged: 40 ms for each token."""
    delays: list[int] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        delays.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def main() -> None:
        with Listener("127.0.0.1", 0, None) as listener:
            server = await asyncio.start_server(accept, sock=listener.sockets[0])
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            server.close()

    asyncio.run(main())
    assert delays[0] != 0
