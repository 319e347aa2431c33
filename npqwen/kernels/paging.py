"""Advice to the operating system about the memory pages of mapped files: huge pages, and prefetching."""

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
import numpy as np
from llvmlite import ir
from numba import njit
from numpy.typing import NDArray

from npqwen.simd.llvm import I32, Int, Int32, call, operation

PREFETCH_NEVER, PREFETCH_ALWAYS, PREFETCH_IF_ABSENT = 0, 1, 2
"""Policies: prefetch nothing, all memory pages that will be used, or those of them that are not in memory."""
_PAGE = mmap.PAGESIZE
_REQUEST_BYTES = 1 << 17
"""Bytes of one request: Linux reads no more of it than the disk accepts at once, and drops the rest."""
_WILLNEED = int(getattr(mmap, "MADV_WILLNEED", 3))


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Have Linux use huge pages of 2 MiB, for a file if its file system supports them; on some virtual machines,
    decoding is 25% faster.

    Use it only for files that fit in memory: touching a byte reads up to 4 MiB. Pages that are already in memory stay
    small.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)


def huge_page_bytes(paths: Iterable[Path], root: Path = Path("/")) -> int | None:
    """Bytes of mapped files that this process reads through huge pages; None where the system does not report it.

    root: the directory of /proc.
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


def prefetch_policy(paths: Iterable[Path], exceeds_memory: bool) -> int:
    """PREFETCH_NEVER, PREFETCH_ALWAYS or PREFETCH_IF_ABSENT, for these mapped files.

    exceeds_memory: whether they are larger than the memory available.

    Prefetching an expert of 2.7 MB takes 50 microseconds even if it is in memory; querying whether it is takes 2. Linux
    answers truthfully only to the file's owner and to users who may write to it; to others it reports every page as in
    memory. On Windows nothing is prefetched: a page is read when it is touched.
    """
    if sys.platform == "win32":
        return PREFETCH_NEVER
    residency_known = sys.platform == "linux" and all(
        path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK) for path in paths
    )
    return PREFETCH_IF_ABSENT if residency_known else PREFETCH_ALWAYS if exceeds_memory else PREFETCH_NEVER


def _address(name: str) -> int:
    """The address of a function of the C library; on Windows, that of an unrelated one, which is never called."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.GetLastError
    else:
        function = getattr(ctypes.CDLL(None), name)
    return ctypes.cast(function, ctypes.c_void_p).value or 0


llvmlite.binding.add_symbol("npqwen_madvise", _address("madvise"))
llvmlite.binding.add_symbol("npqwen_mincore", _address("mincore"))


@operation
def _madvise(b: ir.IRBuilder, address: Int, size: Int, advice: Int32) -> Int32:
    return call(b, "npqwen_madvise", I32, address, size, advice)


@operation
def _mincore(b: ir.IRBuilder, address: Int, size: Int, residency: Int) -> Int32:
    """Write one byte per page to the address `residency`, its lowest bit set if the page is in memory; 0 on success."""
    return call(b, "npqwen_mincore", I32, address, size, residency)


@njit(nogil=True, inline="always")
def _request(start: int, end: int) -> None:
    """Have the system read a range of addresses."""
    for at in range(start, end, _REQUEST_BYTES):
        _madvise(at, min(_REQUEST_BYTES, end - at), _WILLNEED)


@njit(nogil=True)
def prefetch_pages(policy: int, address: int, size: int, residency: Any) -> None:
    """Have the system read `size` bytes of a mapped file at an address in the background.

    policy: PREFETCH_ALWAYS or PREFETCH_IF_ABSENT. residency: scratch, uint8, for one byte per page.
    """
    start, end = address // _PAGE * _PAGE, address + size
    if policy == PREFETCH_ALWAYS:
        _request(start, end)
        return
    for at in range(start, end, residency.size * _PAGE):
        pages = min(residency.size, (end - at + _PAGE - 1) // _PAGE)
        if _mincore(at, pages * _PAGE, residency.ctypes.data):
            _request(at, min(end, at + pages * _PAGE))
            continue
        first = 0
        for page in range(pages + 1):
            if page == pages or residency[page] & 1:
                _request(at + first * _PAGE, at + page * _PAGE)
                first = page + 1


def new_memory(size: int) -> NDArray[np.uint8]:
    """Zeroed memory, aligned to 4,096 bytes, returned to the system once no array refers to it; OSError without room.

    With pages of many different lifetimes, malloc would hold several times the memory in use: of freed memory, it
    returns only the end of its heap.
    """
    if sys.platform == "win32":
        mapping = mmap.mmap(-1, size)
    else:
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        advise_huge_pages(mapping)
    return np.frombuffer(mapping, np.uint8)
