"""The user's messages in the terminal, kept from run to run."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from npqwen.atomic_file import new_file
from npqwen.errors import OutputError

MAX_ENTRIES = 1000
"""Most entries that are kept."""
MAX_LENGTH = 10_000
"""Longest entry that is kept, in characters."""


class History:
    """A file that only its owner can read, with one JSON string per line, oldest first.

    Several terminals may append to it at the same time. If it cannot be read or written, there is no history, but
    no error either: `kept` is then False.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = True
        """False once reading the file, or appending to it, has failed."""
        self.enabled = True
        """Whether entries are added."""

    def entries(self) -> list[str]:
        """The newest entries. A file that has grown too long is shortened."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError:
            self.kept = False
            return []
        entries = [entry for line in lines if (entry := _entry(line))]
        if len(lines) > 2 * MAX_ENTRIES:
            with contextlib.suppress(OutputError), new_file(self.path) as file:
                file.writelines(map(_line, entries[-MAX_ENTRIES:]))
        return entries[-MAX_ENTRIES:]

    def add(self, entry: str) -> None:
        """Append an entry, if `enabled`."""
        if not self.enabled or len(entry) > MAX_LENGTH:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(descriptor, "ab") as file:
                file.write(_line(entry))
        except OSError:
            self.kept = False


def _line(entry: str) -> bytes:
    return (json.dumps(entry) + "\n").encode()


def _entry(line: str) -> str:
    """The entry in a line; empty if the line is damaged (a full disk may cut it) or its text not valid Unicode."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry, str) and entry.encode() else ""
    except (ValueError, RecursionError):
        return ""
