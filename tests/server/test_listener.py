"""The sockets that a server listens on."""

from __future__ import annotations

import asyncio
import socket

import pytest

from npqwen.server.listener import Listener


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_for_this_machine_has_no_other_address(host: str) -> None:
    with Listener(host, 0, None) as listener:
        assert listener.network_url(False) is None


def test_a_server_on_all_addresses_has_one_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    with Listener("0.0.0.0", 0, None) as listener:
        assert listener.url(False) == f"http://127.0.0.1:{listener.port}"
        for address, host in (("192.168.1.10", "192.168.1.10"), ("fd00::2", "[fd00::2]"), (None, socket.gethostname())):
            monkeypatch.setattr("npqwen.server.listener._network_address", lambda family, found=address: found)
            assert listener.network_url(True) == f"https://{host}:{listener.port}"


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
