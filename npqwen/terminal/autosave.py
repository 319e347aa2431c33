"""Automatic saving of conversations in the terminal, so that the last one can be continued."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import uuid
from pathlib import Path

from npqwen.atomic_file import new_file, remove_abandoned
from npqwen.chat.saved_conversation import SavedConversation
from npqwen.errors import FormatError, OutputError

MAX_FILES = 20
"""Most conversations that are kept."""
MAX_BYTES = 16_000_000
"""Size of the largest conversation that is saved, in bytes."""
_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}\.json")


class Autosave:
    """The newest conversations in a directory that only its owner can read, and the file of the current one.

    Several terminals may save there at the same time: each has its own file. If two continue the same conversation,
    the second one to save notices, by the file's size and time, that it has changed, and saves to a new file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.enabled = True
        """Whether `save` does anything."""
        self._path: Path | None = None
        """The file of the current conversation."""
        self._state: tuple[int, int] | None = None
        """Its state when it was last read or written."""
        self._written = b""
        """SHA-256 of the text that was last written."""

    def last(self, model: str) -> tuple[tuple[SavedConversation, Path] | None, list[str]]:
        """The newest conversation with this model, else the newest of all, and its file, which `save` then replaces.

        None if there is none. Also returns the errors of files that could not be read.
        """
        found: tuple[SavedConversation, Path] | None = None
        errors = []
        for path in self._newest_first():
            state = _state(path)
            try:
                saved = SavedConversation.read(path, MAX_BYTES)
            except FormatError as error:
                errors.append(str(error))
                continue
            if found is None or saved.model == model:
                found, self._path, self._state = (saved, path), path, state
            if saved.model == model:
                break
        return found, errors

    def save(self, saved: SavedConversation) -> None:
        """Replace the file of the current conversation atomically if anything has changed. May raise OutputError."""
        if not self.enabled:
            return
        text = saved.encode()
        if len(text) > MAX_BYTES:
            raise OutputError(f"it is larger than {MAX_BYTES / 1e6:.0f} MB; /save FILE saves it")
        digest = hashlib.sha256(text).digest()
        if digest == self._written:
            return
        path = self._path
        new = path is None or self._state != _state(path)
        if path is None or new:
            path = self.directory / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}.json"
            with contextlib.suppress(OSError):
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new_file(path, private=True) as file:
            file.write(text)
        self._path, self._state, self._written = path, _state(path), digest
        if new:
            self._remove_old()

    def begin(self) -> None:
        """Save to a new file from now on: another conversation has begun."""
        self._path, self._state, self._written = None, None, b""

    def forget(self) -> None:
        """Remove the file of the current conversation, unless another terminal has continued it."""
        if self._path is not None and self._state == _state(self._path):
            with contextlib.suppress(OSError):
                self._path.unlink()
        self.begin()

    def _newest_first(self) -> list[Path]:
        try:
            names = [name for name in os.listdir(self.directory) if _NAME.fullmatch(name)]
        except OSError:
            return []
        return sorted(map(self.directory.joinpath, names), key=lambda path: _state(path) or (0, 0), reverse=True)

    def _remove_old(self) -> None:
        remove_abandoned(self.directory)
        for path in self._newest_first()[MAX_FILES:]:
            with contextlib.suppress(OSError):
                path.unlink()


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when the file is replaced: modification time in nanoseconds, and size; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
