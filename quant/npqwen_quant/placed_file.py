"""A file that is written at given offsets, in large aligned pieces."""

from __future__ import annotations

import os
from pathlib import Path

from npqwen.atomic_file import sync_file

WRITE_BYTES = 1 << 21
"""Bytes per write, aligned in the file: Linux keeps each in one huge page, if the file system supports it."""


class PlacedFile:
    """A file that is created unless it exists. Adjacent writes are combined, up to multiples of WRITE_BYTES.

    Its methods raise OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffer = bytearray()
        self._start = 0
        self._file = open(path, "r+b", buffering=0, opener=_create)  # noqa: SIM115

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset. They may stay buffered until later writes, or until `flush`."""
        rest = data.cast("B")
        if offset != self._start + len(self._buffer):
            self.flush()
            self._start = offset
        while rest:
            room = WRITE_BYTES - (self._start + len(self._buffer)) % WRITE_BYTES
            self._buffer.extend(rest[:room])
            if len(rest) >= room:
                self.flush()
            rest = rest[room:]

    def flush(self) -> None:
        """Pass all buffered bytes to the system."""
        with memoryview(self._buffer) as rest:
            self._file.seek(self._start)
            done = 0
            while done < len(rest):
                done += self._file.write(rest[done:])
        self._start += len(self._buffer)
        self._buffer.clear()

    def close(self) -> None:
        """Close the file; bytes that were not flushed are lost."""
        self._file.close()


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with open(path, "r+b") as file:
        sync_file(file.fileno())


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
