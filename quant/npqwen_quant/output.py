"""A converted model on its way to disk: whole and synced under its own name, or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from npqwen.atomic_file import sync_directory, writing
from npqwen.errors import OutputError
from npqwen.format.config import FORMAT_VERSION, is_converted
from npqwen_quant.plan import Tensor

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


Shard = list[Tensor]

_AT_ONCE = 1 << 21
"""Bytes written at a time, from a multiple of them: Linux keeps each in one large page, if the file system can."""


def shards(tensors: Iterable[Tensor], shard_bytes: int) -> list[Shard]:
    """Deal the tensors out, in order, to files of at most `shard_bytes`, or of one tensor."""
    shards: list[Shard] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def header(tensors: Shard) -> bytes:
    """A safetensors file's first bytes, up to the data, which they make start at a multiple of 64."""
    entries: dict[str, Any] = {"__metadata__": {"format": "npqwen", "format_version": str(FORMAT_VERSION)}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


class Output:
    """The directory `path`, made as a hidden sibling and renamed when it is complete.

    As a context manager, it removes the sibling when it is left without `complete()`; a directory that is to be
    replaced must allow that when it is entered.  A process that is killed leaves the sibling behind, with its lock
    free: the next conversion to `path` removes it then.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        """Raises OutputError if `path` exists; with `force`, if it holds anything but a converted model."""
        self.path = Path(os.path.realpath(path))
        self.force = force
        with writing(self.path):
            self._check()
        unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.partial = self.path.with_name(f".{self.path.name}.partial-{unique}")
        self._old = self.path.with_name(f".{self.path.name}.old-{unique}")
        self._lock: BinaryIO | None = None

    def _check(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise OutputError(f"{self.path} exists already and is no directory; choose another place")
        # Neither of these can make room for the finished sibling.
        if os.path.ismount(self.path):
            raise OutputError(f"{self.path} is where a disk is mounted; name a directory inside it")
        if os.path.samefile(self.path, os.curdir):
            raise OutputError(f"{self.path} is the current directory; name a directory inside it, or go to another")
        if not any(self.path.iterdir()):
            return
        if not self.force:
            raise OutputError(f"{self.path} exists already; choose another place, or replace it with --force")
        if not is_converted(self.path):
            raise OutputError(
                f"{self.path} exists already and is no converted model, so it is not replaced; "
                "choose another place, or remove it yourself"
            )

    def check_room(self, nbytes: int) -> None:
        """Raise OutputError if the disk has less than `nbytes` free."""
        with writing(self.path):
            place = next(parent for parent in self.path.parents if parent.exists())
            free = shutil.disk_usage(place).free
        if free < nbytes:
            raise OutputError(
                f"{self.path} would take {nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB is free there"
            )

    def __enter__(self) -> Output:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            # Locked before the directory exists, so that nobody finds that abandoned.
            self._lock = open(_lock_of(self.partial), "wb")
            _try_lock(self._lock)
            try:
                self.partial.mkdir()
                if os.path.lexists(self.path):  # what cannot be renamed is told now, not after hours of work
                    self._step_aside()
                    self._old.rename(self.path)
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        """Remove the sibling, and what stepped aside for it; if that was for nothing, it goes back."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if is_converted(self.path):
            shutil.rmtree(self._old, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self._old.rename(self.path)
        if self._lock is not None:
            self._lock.close()
        with contextlib.suppress(OSError):
            _lock_of(self.partial).unlink()

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Callable[[memoryview | bytes], None]]:
        """A file of this name, given by the function that appends to it; synced when left."""
        with writing(self.path):
            (self.partial / name).parent.mkdir(exist_ok=True)
            file = open(self.partial / name, "wb", buffering=0)  # noqa: SIM115
        held = bytearray()

        def write(data: memoryview | bytes) -> None:
            rest = memoryview(data).cast("B")
            while rest:
                taken = rest[: _AT_ONCE - len(held)]
                held.extend(taken)
                rest = rest[len(taken) :]
                if len(held) == _AT_ONCE:
                    flush()

        def flush() -> None:
            with writing(self.path), memoryview(held) as rest:
                done = 0
                while done < len(rest):
                    done += file.write(rest[done:])
            held.clear()

        with file:
            yield write
            flush()
            with writing(self.path):
                os.fsync(file.fileno())

    def complete(self) -> None:
        """Give the directory its name, once every file in it is synced."""
        with writing(self.path):
            sync_directory(self.partial)
            self._check()
            if not os.path.lexists(self.path):
                self.partial.rename(self.path)
            elif self.force and any(self.path.iterdir()):
                self._step_aside()
                self.partial.rename(self.path)
            else:
                self.path.rmdir()
                self.partial.rename(self.path)
            sync_directory(self.path.parent)

    def _step_aside(self) -> None:
        """Rename what is replaced, which Windows refuses as long as a program has mapped a file in it."""
        try:
            self.path.rename(self._old)
        except PermissionError as error:
            raise OutputError(
                f"{self.path} cannot be replaced ({error.strerror}); end the programs that run this model, "
                "or choose another place"
            ) from error

    def _remove_abandoned(self) -> None:
        ours = re.compile(rf"\.{re.escape(self.path.name)}\.(old|partial)-\d+-[0-9a-f]{{8}}")
        for entry in self.path.parent.iterdir():
            found = ours.fullmatch(entry.name)
            if found is None:
                continue
            if found[1] == "old" and self.path.exists():
                shutil.rmtree(entry, ignore_errors=True)
            elif found[1] == "partial" and entry.is_dir():
                try:
                    with open(_lock_of(entry), "r+b") as lock:
                        abandoned = _try_lock(lock)
                except FileNotFoundError:
                    abandoned = True
                except OSError:
                    abandoned = False
                if abandoned:
                    shutil.rmtree(entry, ignore_errors=True)
                    with contextlib.suppress(OSError):
                        _lock_of(entry).unlink()


def _lock_of(partial: Path) -> Path:
    return partial.with_name(partial.name + ".lock")


def _try_lock(file: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another, or a file system without locks
        return False
    return True
