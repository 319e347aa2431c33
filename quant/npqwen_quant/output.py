"""A converted model on its way to disk: whole and synced under its own name, or not there at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from npqwen.config import FORMAT_VERSION
from npqwen.errors import OutputError
from npqwen_quant.plan import Tensor

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl



Shard = list[Tensor]


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

    As a context manager, it removes the sibling when it is left without `complete()`.  A process that is
    killed leaves it behind, with its lock free: the next conversion to `path` removes it then.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        """Raises OutputError if `path` exists; with `force`, if it holds anything but a converted model."""
        self.path = path.resolve()
        self.force = force
        with self._writing():
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
        if not any(self.path.iterdir()):
            return
        if not self.force:
            raise OutputError(f"{self.path} exists already; choose another place, or replace it with --force")
        if not _is_converted(self.path):
            raise OutputError(
                f"{self.path} exists already and is no converted model, so it is not replaced; "
                "choose another place, or remove it yourself"
            )

    def check_room(self, nbytes: int) -> None:
        """Raise OutputError if the disk has less than `nbytes` free."""
        place = next(parent for parent in self.path.parents if parent.exists())
        free = shutil.disk_usage(place).free
        if free < nbytes:
            raise OutputError(
                f"{self.path} would take {nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB is free there"
            )

    def __enter__(self) -> Output:
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            # Locked before the directory exists, so that nobody finds that abandoned.
            self._lock = open(_lock_of(self.partial), "wb")
            _try_lock(self._lock)
            try:
                self.partial.mkdir()
            except OSError:
                self._discard()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        with contextlib.suppress(OSError):
            _lock_of(self.partial).unlink()

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Callable[[memoryview | bytes], None]]:
        """A file of this name, given by the function that appends to it; synced when left."""
        with self._writing():
            (self.partial / name).parent.mkdir(exist_ok=True)
            file = open(self.partial / name, "wb", buffering=0)  # noqa: SIM115

        def write(data: memoryview | bytes) -> None:
            rest = memoryview(data).cast("B")
            with self._writing():
                while rest:
                    rest = rest[file.write(rest) :]

        with file:
            yield write
            with self._writing():
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn the operating system's refusals into OutputError."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(f"{self.path} does not fit: no room is left on the disk") from error
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def complete(self) -> None:
        """Give the directory its name, once every file in it is synced."""
        with self._writing():
            _sync_directory(self.partial)
            self._check()
            if not os.path.lexists(self.path):
                self.partial.rename(self.path)
            elif self.force and any(self.path.iterdir()):
                self._step_aside()
                try:
                    self.partial.rename(self.path)
                except OSError:
                    self._old.rename(self.path)
                    raise
                shutil.rmtree(self._old, ignore_errors=True)
            else:
                self.path.rmdir()
                self.partial.rename(self.path)
            _sync_directory(self.path.parent)

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
        for entry in self.path.parent.iterdir():
            if entry.name.startswith(f".{self.path.name}.old-") and self.path.exists():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.startswith(f".{self.path.name}.partial-") and entry.is_dir():
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


def _is_converted(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == "npqwen")
    except (OSError, ValueError, KeyError, TypeError):
        return False


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


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":  # directories cannot be opened there; NTFS journals renames itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
