"""Locks between processes."""

from __future__ import annotations

import errno
import os
import sys
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_PLACE = 2**31 - 1
"""The offset of the byte that is locked on Windows: the last one that msvcrt can lock. Files need not reach it. Other
processes cannot read a locked byte, so it must not be one that they need."""


def try_lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed or the process ends; False if another process has locked it.

    Its position and content do not matter, and stay as they are. Raises OSError where the file system has no locks.
    """
    try:
        if sys.platform == "win32":
            # msvcrt locks at the current position, which may be the file's end
            position = os.lseek(file.fileno(), 0, os.SEEK_CUR)
            os.lseek(file.fileno(), _PLACE, os.SEEK_SET)
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(file.fileno(), position, os.SEEK_SET)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
