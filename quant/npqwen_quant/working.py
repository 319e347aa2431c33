"""The working directory of a conversion: partial results, from which an interrupted conversion is resumed.

It lies beside the output, hidden, and its name has a hash of what the result depends on:

    .NAME.partial-KEY/
        lock          locked by the process that works here
        journal.json  which parts of the output have been synced; replaced atomically
        output/       the model's files, until the directory is renamed to the output's name
        source/       weights that were downloaded for the conversion (npqwen_quant.sharded)
        calibration/  the results of a calibration so far (npqwen_quant.calibration)
        old/          the model to be replaced, where names cannot be exchanged in one step
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from npqwen.atomic_file import HEX_DIGITS, PARTIAL, REMOVED, hidden_sibling, sync_directory, sync_file, writing
from npqwen.errors import OutputError
from npqwen.file_lock import try_lock

_LOCK_TIMEOUT = 0.3
"""Seconds to wait for a lock: another process may hold it briefly, to remove an abandoned directory."""


class BusyError(OutputError):
    """Another process is running the same conversion. `lock`: the file that it holds locked."""

    def __init__(self, message: str, lock: Path) -> None:
        super().__init__(message)
        self.lock = lock

    def wait(self) -> None:
        """Wait until that process has ended."""
        while True:
            try:
                with open(self.lock, "r+b") as file:
                    if try_lock(file):
                        return
            except OSError:  # gone
                return
            time.sleep(0.1)


@dataclass
class Journal:
    """The parts of a conversion that have been synced to the disk."""

    steps: int = 0
    """The number of steps (npqwen_quant.steps), in their order."""
    digests: dict[str, str] = field(default_factory=dict)
    """Digests of the complete tensors, by name (npqwen.format.checksums)."""


class WorkingDirectory:
    """A conversion's working directory."""

    def __init__(self, out: Path, path: Path) -> None:
        """out: the output's absolute path. path: the directory's own, which need not exist."""
        self.out = out
        self.path = path
        self.output, self.source, self.calibration, self._old = (
            path / name for name in ("output", "source", "calibration", "old")
        )
        self._journal = path / "journal.json"
        self._lock: BinaryIO | None = None

    @classmethod
    def open(cls, out: Path, key: str) -> WorkingDirectory:
        """Lock the working directory of a conversion; create it unless an interrupted conversion has left it.

        key: what the result depends on. Raises BusyError if another process has locked it. On a file system without
        locks, always create a new directory: two processes must not share one.
        """
        with writing(out):
            found = cls(out, _path(out, key))
            try:
                locked = found._take_lock()
            except BaseException:
                with contextlib.suppress(OSError):  # not empty
                    found.path.rmdir()
                raise
            if not locked:
                found = cls(out, _path(out, f"{key} {uuid.uuid4()}"))
                found.path.mkdir(parents=True)
        return found

    def _take_lock(self) -> bool:
        """Create the directory and lock it; False where the file system has no locks."""
        lock = self.path / "lock"
        end = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = open(lock, "wb")  # noqa: SIM115
            except (FileExistsError, FileNotFoundError):  # another conversion removes the directory at this moment
                if time.monotonic() > end:
                    raise
                continue
            try:
                held = try_lock(file)
                if held and self._is_lock(file):
                    self._lock = file
                    return True
            except OSError:
                with contextlib.suppress(OSError):
                    lock.unlink()
                    self.path.rmdir()
                return False
            finally:
                if self._lock is not file:
                    file.close()
            if not held and time.monotonic() > end:
                raise BusyError(f"{self.out} is being converted by another process; wait until it ends", lock)
            time.sleep(0.01)

    def lock_abandoned(self) -> bool:
        """Lock the directory if no process works there. Return whether it is locked."""
        try:
            file = open(self.path / "lock", "r+b")  # noqa: SIM115
        except OSError:  # not there yet, or another user's
            return False
        with contextlib.suppress(OSError):  # no locks on this file system: whether a process works there is unknown
            if try_lock(file) and self._is_lock(file):
                self._lock = file
                return True
        file.close()
        return False

    def _is_lock(self, file: BinaryIO) -> bool:
        """Whether an open file is the lock: before it was locked, another process may have removed the directory."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), (self.path / "lock").stat())
        except FileNotFoundError:
            return False

    def unlock(self) -> None:
        """Release the lock, so that other processes can work there."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def load(self) -> Journal:
        """The journal; an empty one if there is none."""
        try:
            found = json.loads(self._journal.read_bytes())
            return Journal(int(found["steps"]), dict(found["digests"]))
        except (OSError, ValueError, LookupError, TypeError):  # it is replaced as a whole, so it is never half-written
            return Journal()

    def store(self, journal: Journal) -> None:
        """Replace the journal atomically. Everything that it records must have been synced."""
        partial = self.path / "journal.partial"
        with writing(self.out):
            with open(partial, "wb") as file:
                file.write(json.dumps(asdict(journal)).encode())
                file.flush()
                sync_file(file.fileno())
            partial.replace(self._journal)
            sync_directory(self.path)

    def forget(self) -> None:
        """Remove the journal, so that no conversion resumes from the contents of `output`."""
        self._journal.unlink(missing_ok=True)
        sync_directory(self.path)

    def is_resumable(self) -> bool:
        """Whether anything in it saves the next conversion some work."""
        files = (path for place in (self.source, self.calibration) for path in place.rglob("*") if path.is_file())
        return self._journal.exists() or any(path.stat().st_size for path in files)

    def allocated(self) -> int:
        """Bytes that its files occupy on the disk."""
        return sum(_allocated(path) for path in self.path.rglob("*"))

    def move_aside(self) -> None:
        """Move the model that is to be replaced into this directory."""
        self.out.rename(self._old)

    def put_back(self) -> None:
        """Move a model back that was moved aside, unless another one has taken its place."""
        if self._old.is_dir() and not os.path.lexists(self.out):
            self._old.rename(self.out)

    def remove(self) -> None:
        """Remove the directory, renamed first: under its name it is whole or gone. Files that the system refuses to
        delete stay, hidden."""
        with contextlib.suppress(OSError):
            self.put_back()
        if sys.platform == "win32":  # does not rename a directory that has an open file
            self.unlock()
        aside = hidden_sibling(self.out, REMOVED)
        try:
            self.path.rename(aside)
        except OSError:
            aside = self.path
        shutil.rmtree(aside, ignore_errors=True)


def others(out: Path, own: Path | None = None) -> Iterator[WorkingDirectory]:
    """The abandoned working directories of conversions to the same place; each is locked while the caller has it."""
    for path in _siblings(out, PARTIAL):
        found = WorkingDirectory(out, path)
        if path != own and found.lock_abandoned():
            try:
                yield found
            finally:
                found.unlock()


def held_bytes(out: Path) -> int:
    """Bytes that interrupted conversions to this place occupy on the disk: the next one resumes or removes them."""
    return sum(work.allocated() for work in others(Path(os.path.realpath(out))))


def remove_removed(out: Path) -> None:
    """Remove what is left of working directories whose removal was interrupted."""
    for path in _siblings(out, REMOVED):
        shutil.rmtree(path, ignore_errors=True)


def _siblings(out: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(out.name)}\.{kind}-[0-9a-f]{{{HEX_DIGITS}}}")
    if not out.parent.is_dir():
        return []
    return [path for path in sorted(out.parent.iterdir()) if pattern.fullmatch(path.name)]


def _path(out: Path, key: str) -> Path:
    return hidden_sibling(out, PARTIAL, hashlib.sha256(key.encode()).hexdigest())


def _allocated(path: Path) -> int:
    try:
        state = path.lstat()
    except OSError:  # removed meanwhile
        return 0
    # st_blocks, where the system has it: files that are written at several offsets are sparse.
    return getattr(state, "st_blocks", -(-state.st_size // 512)) * 512
