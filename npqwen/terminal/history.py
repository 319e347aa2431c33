"""What somebody said to models in the terminal, kept from run to run."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path

ENTRIES = 1000
"""Entries that are kept."""
LONGEST = 10_000
"""Characters of an entry; longer ones are not kept."""


class History:
    """A file that this user alone may read: one JSON string a line, oldest first.

    Several terminals may add to it at a time. A file that cannot be read or written means no history, and no error:
    `kept` tells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = True
        """Whether what was added is in the file."""

    def entries(self) -> list[str]:
        """The newest entries. A file that has grown too long is cut."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError:
            self.kept = False
            return []
        found = [entry for line in lines if (entry := _entry(line))]
        if len(lines) > 2 * ENTRIES:
            self._write(found[-ENTRIES:])
        return found[-ENTRIES:]

    def add(self, entry: str) -> None:
        """Append one entry."""
        if len(entry) > LONGEST:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(descriptor, "ab") as file:
                file.write(_line(entry))
        except OSError:
            self.kept = False

    def _write(self, entries: list[str]) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial-{uuid.uuid4().hex[:12]}")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.writelines(map(_line, entries))
            os.replace(partial, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()


def _line(entry: str) -> bytes:
    return (json.dumps(entry) + "\n").encode()


def _entry(line: str) -> str:
    """The entry in a line; empty for a line that is none, as after a disk was full."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return entry if isinstance(entry, str) else ""
