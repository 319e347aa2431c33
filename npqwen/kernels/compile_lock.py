"""Locks that let one process compile a function while others that need it wait, and then load what it has stored."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import BinaryIO

from numba.core import event

from npqwen.file_lock import try_lock

WAITING = "npqwen:waiting"
"""The Numba event that reports waiting."""
TIMEOUT = 300.0
"""Seconds to wait for another process, which may be suspended."""
_POLL_SECONDS = 0.05


class CompileLock:
    """The lock of one function. It only saves work; correctness does not depend on it: where files cannot be locked or
    written, and after TIMEOUT, processes compile the same function concurrently. A killed process leaves an empty
    file, unlocked.
    """

    def __init__(self, path: Path) -> None:
        """path: of the file, whose directory exists."""
        self._path = path
        self._file: BinaryIO | None = None

    def acquire(self) -> None:
        """Wait until no other process holds it, at most TIMEOUT. Raises nothing but KeyboardInterrupt."""
        with contextlib.suppress(OSError):
            if self._try():
                return
            end = time.monotonic() + TIMEOUT
            with event.trigger_event(WAITING):
                while not self._try() and time.monotonic() < end:
                    time.sleep(_POLL_SECONDS)

    def _try(self) -> bool:
        """Opens the file each time: a process forked in the meantime may still hold the lock of a removed file."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        file = open(os.open(self._path, flags, 0o600), "r+b")  # noqa: SIM115
        try:
            if try_lock(file):
                self._file = file
                return True
            return False
        finally:
            if self._file is not file:
                file.close()

    def release(self) -> None:
        """Remove the file. Has no effect on a lock that is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):  # Windows removes no file that another process is about to lock
                self._path.unlink()
