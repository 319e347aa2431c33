"""The directory of a converted model, written as a whole: under its own name it is complete and synced, or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from npqwen.atomic_file import exchange, sync_directory, writing
from npqwen.errors import OutputError, size
from npqwen.format.quantization import is_converted

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

WRITE_BYTES = 1 << 21
"""Bytes per write, aligned in the file: Linux keeps each in one huge page, if the file system supports it."""


class Output:
    """The directory `path`, written as a hidden sibling and renamed once it is complete.

    A context manager that removes the sibling when it is left without `complete()`. A killed process leaves the sibling
    behind, unlocked: the next conversion to `path` removes it.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        """Raises OutputError if `path` exists; with `force`, only if it holds anything but a converted model."""
        self.path = Path(os.path.realpath(path))
        self.force = force
        with writing(self.path):
            self._clean_up()
            self._check()
        self._suffix = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.partial = self._sibling("partial", self._suffix)
        self._old = self._sibling("old", self._suffix)
        self._lock: BinaryIO | None = None

    def check_room(self, nbytes: int) -> None:
        """Raise OutputError if the disk has less than `nbytes` free."""
        with writing(self.path):
            existing = next(parent for parent in self.path.parents if parent.exists())
            free = shutil.disk_usage(existing).free
        if free < nbytes:
            raise OutputError(f"{self.path} would take {size(nbytes)}, but only {size(free)} is free there")

    def __enter__(self) -> Output:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Locked before the directory exists, so that no other conversion takes it for abandoned.
            self._lock = _locked(self._lock_path(self._suffix))
            try:
                self.partial.mkdir()
                if os.path.lexists(self.path):  # a directory that cannot be renamed is refused now, not after hours
                    self._move_aside()
                    self._old.rename(self.path)
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Callable[[memoryview | bytes], None]]:
        """Create the file of this name. Yields a function that appends to it; on leaving, the file is synced."""
        with writing(self.path):
            (self.partial / name).parent.mkdir(exist_ok=True)
            file = open(self.partial / name, "wb", buffering=0)  # noqa: SIM115
        buffer = bytearray()

        def write(data: memoryview | bytes) -> None:
            rest = memoryview(data).cast("B")
            while rest:
                taken = rest[: WRITE_BYTES - len(buffer)]
                buffer.extend(taken)
                rest = rest[len(taken) :]
                if len(buffer) == WRITE_BYTES:
                    flush()

        def flush() -> None:
            with writing(self.path), memoryview(buffer) as rest:
                done = 0
                while done < len(rest):
                    done += file.write(rest[done:])
            buffer.clear()

        with file:
            yield write
            flush()
            with writing(self.path):
                os.fsync(file.fileno())

    def adopt(self, file: Path, name: str) -> None:
        """Move a synced file of the same disk into the directory."""
        with writing(self.path):
            file.rename(self.partial / name)

    def link(self, file: Path, name: str) -> None:
        """Put a file of the same disk into the directory without copying it; copied where there are no hard links."""
        with writing(self.path):
            try:
                os.link(file, self.partial / name)
            except OSError:
                shutil.copyfile(file, self.partial / name)
                with open(self.partial / name, "rb+") as copy:
                    os.fsync(copy.fileno())

    def complete(self) -> None:
        """Give the directory its name; every file in it has been synced."""
        with writing(self.path):
            sync_directory(self.partial)
            self._check()
            try:
                self._take_name()
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):  # another process was faster
                    self._check()
                raise
            sync_directory(self.path.parent)

    def _take_name(self) -> None:
        if not os.path.lexists(self.path):
            self.partial.rename(self.path)
        elif not exchange(self.partial, self.path):  # else the old model is discarded under the sibling's name
            if any(self.path.iterdir()):
                self._move_aside()
            else:
                self.path.rmdir()
            self.partial.rename(self.path)

    def _check(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise OutputError(f"{self.path} exists already and is not a directory; choose another place")
        # Neither of these can be renamed to make room for the finished sibling.
        if os.path.ismount(self.path):
            raise OutputError(f"{self.path} is a mount point; name a directory inside it")
        if os.path.samefile(self.path, os.curdir):
            raise OutputError(f"{self.path} is the current directory; name a directory inside it, or leave it first")
        if not any(self.path.iterdir()):
            return
        if not self.force:
            raise OutputError(f"{self.path} exists already; choose another place, or replace it with --force")
        if not is_converted(self.path):
            raise OutputError(
                f"{self.path} exists already and is not a converted model, so it is not replaced; "
                "choose another place, or remove it yourself"
            )

    def _move_aside(self) -> None:
        """Rename the directory to be replaced, which Windows refuses while a program has mapped a file in it."""
        try:
            self.path.rename(self._old)
        except PermissionError as error:
            raise OutputError(
                f"{self.path} cannot be replaced ({error.strerror}); end the programs that run this model, "
                "or choose another place"
            ) from error

    def _discard(self) -> None:
        """Remove the sibling and the replaced model; put the latter back if nothing replaced it."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self._settle(self._old)
        if self._lock is not None:
            self._lock.close()
        with contextlib.suppress(OSError):
            self._lock_path(self._suffix).unlink()

    def _settle(self, old: Path) -> None:
        """Remove `old`, a model that was moved aside; if no model has taken its place, put it back."""
        if is_converted(self.path):
            shutil.rmtree(old, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                old.rename(self.path)

    def _clean_up(self) -> None:
        """Remove what killed conversions to this path left, and put back a model that one had moved aside."""
        if not self.path.parent.is_dir():
            return
        ours = re.compile(rf"\.{re.escape(self.path.name)}\.(?:old|partial)-(\d+-[0-9a-f]{{8}})(?:\.lock)?")
        found = {match[1] for entry in self.path.parent.iterdir() if (match := ours.fullmatch(entry.name))}
        for suffix in found:
            with contextlib.suppress(OSError):
                self._remove_abandoned(suffix)

    def _remove_abandoned(self, suffix: str) -> None:
        """Remove the remains of the conversion with this suffix, unless its process is still running."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileNotFoundError):
                if not try_lock(stack.enter_context(open(self._lock_path(suffix), "r+b"))):
                    return
            shutil.rmtree(self._sibling("partial", suffix), ignore_errors=True)
            if (old := self._sibling("old", suffix)).is_dir():
                self._settle(old)
        self._lock_path(suffix).unlink(missing_ok=True)

    def _sibling(self, kind: str, suffix: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{kind}-{suffix}")

    def _lock_path(self, suffix: str) -> Path:
        return self._sibling("partial", suffix + ".lock")


def _locked(path: Path) -> BinaryIO:
    """Create and lock a file; where the file system has no locks, only create it."""
    while True:
        file = open(path, "wb")  # noqa: SIM115
        try:
            held = try_lock(file)
        except OSError:
            return file
        # Another conversion may clean it up before it is locked: then it holds the lock, or has removed the file.
        if held and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
        time.sleep(0.01)


def try_lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed or the process ends; False if another process has locked it.

    Raises OSError where the file system has no locks.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
