"""Accepting connections without using up the file descriptors of the process, of which each connection takes one."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

ENOUGH = 4096
"""Descriptors up to which the process's limit is raised: more than clients need, fewer than would strain memory."""


@dataclass
class ConnectionLimit:
    """How many connections several sockets may have accepted that are still open. open: those."""

    most: int
    make_room: Callable[[], bool]
    """Called for each further one. Closes another connection; False if it cannot, and then the new one is closed."""
    open: WeakSet[socket.socket] = field(default_factory=WeakSet)


class AcceptingSocket(socket.socket):
    """A listening socket for asyncio on POSIX systems. asyncio itself accepts connections until the system refuses,
    and then logs a traceback for each of thousands of attempts."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.limit = ConnectionLimit(sys.maxsize, lambda: False)
        self._pausing = False

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection, and its client's address. Raises BlockingIOError to make asyncio finish a turn."""
        if self._pausing:
            self._pausing = False
            raise BlockingIOError
        try:
            accepted, address = super().accept()
        except OSError as error:
            self._pausing = not isinstance(error, BlockingIOError)  # asyncio would try again in the same turn
            raise
        connection = _Accepted(accepted, self.limit.open)
        if len(self.limit.open) > self.limit.most:
            if not self.limit.make_room():
                connection.close()
                raise BlockingIOError
            self._pausing = True  # asyncio releases the descriptor of a closed connection after the turn
        return connection, address


class _Accepted(socket.socket):
    """A connection that is in `open` until it is closed."""

    def __init__(self, accepted: socket.socket, open: WeakSet[socket.socket]) -> None:
        """accepted: gives its descriptor away."""
        # The protocol is named, as asyncio sets TCP_NODELAY by it and not every system tells it of a descriptor.
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._open = open
        open.add(self)

    def close(self) -> None:
        self._open.discard(self)
        super().close()


def raise_limit() -> int:
    """Raise the process's limit on descriptors to `ENOUGH`, or as far as the system permits.

    Returns how many of them connections may use: the rest is for models and prefixes.
    """
    if sys.platform == "win32":  # which has no such limit
        return sys.maxsize
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _finite(hard)
    if _finite(soft) < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _finite(soft) * 3 // 4


def _finite(limit: int) -> int:
    """A limit of the system, at most `ENOUGH`; negative numbers stand for none."""
    return ENOUGH if limit < 0 else min(limit, ENOUGH)
