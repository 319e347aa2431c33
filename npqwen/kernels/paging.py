"""What the system is asked about a mapped file's pages: to make them large, to read some before they are needed."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

PREFETCH_NEVER, PREFETCH_ALWAYS, PREFETCH_IF_ABSENT = 0, 1, 2
"""How to ask: not at all, for whatever is needed, or for those of its pages that are not in memory."""
_PAGE = mmap.PAGESIZE
_PIECE = 1 << 17
"""Linux reads no more for one request than the disk takes at once, and drops the rest."""
_WILLNEED = int(getattr(mmap, "MADV_WILLNEED", 3))


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Have Linux read a file in pages of 2 MiB, if the file system can: some virtual machines decode a quarter faster.

    For files that memory holds whole: 4 MiB are read for whatever is touched.  Pages that are in memory already stay
    as they are.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            mapping.madvise(mmap.MADV_HUGEPAGE)


def huge_page_bytes(paths: Iterable[Path], root: Path = Path("/")) -> int | None:
    """Bytes of mapped files that this process reads through large pages; None where the system does not tell.

    root: where /proc is.
    """
    names = {str(path.resolve()) for path in paths}
    found, ours = None, False
    try:
        with open(root / "proc/self/smaps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                words = line.split(None, 5)
                if not words[0].endswith(":"):  # of a mapping: addresses, permissions, offset, device, inode, path
                    ours = len(words) == 6 and words[5].rstrip("\n") in names
                elif ours and words[0] == "FilePmdMapped:":
                    found = (found or 0) + 1024 * int(words[1])
    except (OSError, ValueError, IndexError):
        return None
    return found


def prefetch_policy(paths: Iterable[Path], short: bool) -> int:
    """PREFETCH_NEVER, PREFETCH_ALWAYS or PREFETCH_IF_ABSENT, for these mapped files.

    short: whether they are more than memory holds.

    Asking for what is in memory costs 50 microseconds for an expert of 2.7 MB, looking 2.  Linux tells which pages of
    a file are in memory to its owner and to those who may write it; to others it says that all are.  Windows
    takes no requests: it reads a page when it is touched.
    """
    if sys.platform == "win32":
        return PREFETCH_NEVER
    tells = sys.platform == "linux" and all(
        path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK) for path in paths
    )
    return PREFETCH_IF_ABSENT if tells else PREFETCH_ALWAYS if short else PREFETCH_NEVER


def _address(name: str) -> int:
    """Where a function of the system's library is; where something never called is, if there is none."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.GetLastError
    else:
        function = getattr(ctypes.CDLL(None), name)
    return ctypes.cast(function, ctypes.c_void_p).value or 0


llvmlite.binding.add_symbol("npqwen_madvise", _address("madvise"))
llvmlite.binding.add_symbol("npqwen_mincore", _address("mincore"))


def _call(name: str, b: ir.IRBuilder, args: Any) -> ir.Value:
    kind = ir.FunctionType(ir.IntType(32), [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


@intrinsic
def _advise(_: Any, address: Any, size: Any, advice: Any) -> Any:
    sig = types.int32(types.int64, types.int64, types.int32)
    return sig, lambda context, b, sig, args: _call("npqwen_madvise", b, args)


@intrinsic
def _look(_: Any, address: Any, size: Any, seen: Any) -> Any:
    """One byte a page at the address `seen`, its lowest bit set if the page is in memory; 0 unless that fails."""
    sig = types.int32(types.int64, types.int64, types.int64)
    return sig, lambda context, b, sig, args: _call("npqwen_mincore", b, args)


@njit(nogil=True, inline="always")
def _ask(start: int, end: int) -> None:
    for at in range(start, end, _PIECE):
        _advise(at, min(_PIECE, end - at), _WILLNEED)


@njit(nogil=True)
def prefetch_pages(how: int, address: int, size: int, seen: Any) -> None:
    """Have the system read `size` bytes of a mapped file at an address, while we go on.

    how: PREFETCH_ALWAYS or PREFETCH_IF_ABSENT.  seen: scratch, uint8.
    """
    start, end = address // _PAGE * _PAGE, address + size
    if how == PREFETCH_ALWAYS:
        _ask(start, end)
        return
    for at in range(start, end, seen.size * _PAGE):
        pages = min(seen.size, (end - at + _PAGE - 1) // _PAGE)
        if _look(at, pages * _PAGE, seen.ctypes.data):
            _ask(at, min(end, at + pages * _PAGE))
            continue
        first = 0
        for page in range(pages + 1):
            if page == pages or seen[page] & 1:
                _ask(at + first * _PAGE, at + page * _PAGE)
                first = page + 1
