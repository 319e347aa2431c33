"""Reading files that others made: regular files only, and small ones up to a limit.

A link to a device or a named pipe in a downloaded directory would otherwise exhaust memory, or block.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from numpy.typing import NDArray

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""Most bytes of a Git LFS pointer."""

SMALL = 50_000_000
"""Bytes up to which a file is read whole: far above any tokenizer. Qwen3's has 11 MB."""
LARGEST_JSON = 16_000_000
"""Bytes up to which JSON is read, unless it is an index."""
VALUES = 300_000
"""Most values of JSON, unless it is a header or an index: 3 bytes may become an object of 64."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered; OSError if it is missing, unreadable or not a regular file."""
    # O_NONBLOCK: opening a named pipe would wait for its writer. It does not affect regular files.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError:  # a NUL in the name
        raise OSError(errno.EINVAL, "its name is not a valid file name") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def fill(file: BinaryIO, array: NDArray[Any]) -> int:
    """Fill a contiguous array from a file; returns the bytes read, fewer than the array's only at the end of the file.
    """
    rest = array.reshape(-1).view("u1")
    while rest.size and (done := file.readinto(rest.data)):  # type: ignore[attr-defined]
        rest = rest[done:]
    return array.nbytes - rest.size


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the pointer that Git without Git LFS leaves in place of a large file."""
    try:
        return read_small(path, _POINTER_BYTES).startswith(_POINTER)
    except OSError:
        return False


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """All of a regular file; OSError if it is larger than `limit` bytes, and where open_regular raises it."""
    with open_regular(path) as file:
        data = bytearray()
        # Not in larger pieces: glibc would serve later arrays of such a size from the heap, where zeros take memory.
        while part := file.read(min(limit + 1 - len(data), 1 << 16)):
            data += part
            if len(data) > limit:
                raise OSError(errno.EFBIG, f"it is larger than {limit / 1e6:.0f} MB")
    return bytes(data)


def read_json_text(data: bytes, values: int = VALUES) -> Any:
    """The value of JSON in UTF-8; ValueError or RecursionError if it is not JSON, or would take too much memory.

    data: of a bounded size. values: the most values that it may have.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > values:
        raise ValueError(f"it has more than {values:,} values")
    return json.loads(data.decode("utf-8"))
