"""Calls of single kernels, alone and in a team of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from npqwen.engine.team import Team
from npqwen.kernels.compiled import compile_kernel
from npqwen.kernels.pieces import new_state


def run(kernel: Any, *args: Any) -> Any:
    """Call a kernel, compiled and cached like those of the package."""
    compile_kernel(kernel, args)
    return kernel(*args)


def call_at(address: int, *args: int) -> None:
    """Call a kernel that takes integers at the address of its machine code (npqwen/kernels/entry.py)."""
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(args))(int(address))(*args)


def together(members: int, kernel: Any, args: Callable[[int], tuple[Any, ...]]) -> None:
    """Call kernel(row, *args(member)) in each member of a team of threads."""
    compile_kernel(kernel, (new_state(1)[1], *args(0)))
    team = Team(members)
    try:
        team.run(lambda row, member: kernel(row, *args(member)))
    finally:
        team.close()
