"""Asking the system for pages of a mapped file before they are read."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_PAGE = mmap.PAGESIZE
_WILLNEED = int(getattr(mmap, "MADV_WILLNEED", 3))


def can_ask() -> bool:
    """Whether this system takes such requests; Windows reads a page when it is touched."""
    return sys.platform != "win32"


def _madvise() -> int:
    """The address of the system's madvise, or of something never called where there is none."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.GetLastError
    else:
        function = ctypes.CDLL(None).madvise
    return ctypes.cast(function, ctypes.c_void_p).value or 0


llvmlite.binding.add_symbol("npqwen_madvise", _madvise())


@intrinsic
def _advise(_: Any, address: Any, size: Any, advice: Any) -> Any:
    sig = types.int32(types.int64, types.int64, types.int32)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [a.type for a in args])
        return b.call(cgutils.get_or_insert_function(b.module, kind, "npqwen_madvise"), args)

    return sig, generate


@njit(nogil=True)
def ask_for(address: int, size: int) -> None:
    """Have the system read `size` bytes of a mapped file at an address, while we go on.

    It takes some microseconds for what is in memory already: worth it only where memory is short.
    """
    start = address // _PAGE * _PAGE
    _advise(start, address + size - start, _WILLNEED)
