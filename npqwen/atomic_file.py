"""A file that has its name only once it is whole and on the disk: until then there is the old one, or none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from npqwen.errors import OutputError

_ABANDONED = 3600
"""Seconds without a write after which a partial file was left by a process that was killed."""


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when it is left without an exception, and else is removed.

    Its directory is made; a link stays one, and a file that is replaced leaves its permissions. Raises OutputError for
    a directory, a device, and whatever the system refuses in here.
    """
    with writing(path):
        if path.is_dir():
            raise OutputError(f"{path} is a directory; give the name of a file")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is no file that can be replaced; give the name of a file")
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:12]}")
        try:
            with open(partial, "wb") as file:
                if target.exists():
                    shutil.copymode(target, partial)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync_directory(target.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is written into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path} does not fit: no room is left on the disk") from error
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
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


def _remove_abandoned(path: Path) -> None:
    """Remove what a process that was killed left of an earlier file of this name."""
    for entry in path.parent.iterdir():
        if entry.name.startswith(f".{path.name}.partial-"):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _ABANDONED:
                    entry.unlink()
