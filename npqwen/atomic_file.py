"""Atomic replacement of files and directories: write a temporary file next to the old one, sync, rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from npqwen.errors import OutputError

if sys.platform == "darwin":
    import fcntl

PARTIAL = "partial"
"""The kind of a hidden sibling that is not complete yet."""
REMOVED = "removed"
"""The kind of a hidden sibling whose removal has begun."""
HEX_DIGITS = 12
"""How many a hidden sibling's name ends with."""

_ABANDONED = 3600
"""Seconds without a write after which a temporary file counts as left behind by a killed process."""


@contextlib.contextmanager
def new_file(path: Path, *, private: bool = False, sync: bool = True) -> Iterator[BinaryIO]:
    """Yields a temporary file, which replaces `path` on leaving; after an exception it is removed instead.

    A symbolic link is followed, and the permissions of a replaced file are kept. private: only the owner can read a new
    file. sync: wait until the file is on the disk; without it, a file may be damaged after a power failure. Raises
    OutputError if `path` is a directory or a device or its directory is missing, and for every OSError within.
    """
    with writing(path):
        check_regular(path)
        target = Path(os.path.realpath(path))
        check_parent(target if path.is_symlink() else path)
        remove_abandoned(target.parent, target.name)
        partial = hidden_sibling(target, PARTIAL)
        try:
            with open(partial, "wb", opener=_open_private if private else None) as file:
                if target.exists():
                    shutil.copymode(target, partial)
                yield file
                if sync:
                    file.flush()
                    sync_file(file.fileno())
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        if sync:
            sync_directory(target.parent)


def sync_file(descriptor: int) -> None:
    """Return once what was written to an open file is on the disk, and survives a power failure."""
    if sys.platform == "darwin":  # where fsync leaves the data in the drive's own cache
        with contextlib.suppress(OSError):  # a file system without it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def check_regular(path: Path) -> None:
    """Raise OutputError for a path that exists and is a directory, a device, a pipe or a socket."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give the name of a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file; give the name of a file")


def check_parent(path: Path) -> None:
    """Raise OutputError unless the parent directory of `path` exists: it is not created, as it may be misspelled."""
    if not os.path.lexists(path.parent):
        raise OutputError(f"the directory {path.parent} does not exist; create it, or choose another")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError within into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path} does not fit: no room is left on the disk") from error
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def hidden_sibling(path: Path, kind: str, digits: str | None = None) -> Path:
    """The path of a file or directory beside `path` that is never mistaken for a complete one: `.NAME.KIND-HEX`.

    kind: PARTIAL or REMOVED. digits: hexadecimal, of which the first HEX_DIGITS are used; None for random ones.
    """
    return path.with_name(f".{path.name}.{kind}-{(digits or uuid.uuid4().hex)[:HEX_DIGITS]}")


def sync_directory(path: Path) -> None:
    """Sync a directory's entries to the disk."""
    if sys.platform == "win32":  # directories cannot be opened there; NTFS journals renames
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_file(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # not supported by some network file systems
            raise
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Swap the names of two files or directories in one step; False where the system has no such step.

    Linux's renameat2 with RENAME_EXCHANGE. Raises OSError if the system has it but refuses.
    """
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if swap is None:
        return False
    here, both_exchanged = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap(here, os.fsencode(first), here, os.fsencode(second), both_exchanged) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


def remove_abandoned(directory: Path, name: str = "") -> None:
    """Remove temporary files that killed processes left in `directory`: those of one file, or of all."""
    for entry in directory.glob(f".{glob.escape(name) if name else '*'}.{PARTIAL}-*"):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > _ABANDONED:
                entry.unlink()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
