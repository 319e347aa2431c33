"""Atomics by which the threads of a team share work and wait for each other: compiled code only.

A barrier of atomics takes a third of a microsecond; waking a thread takes tens of them (npqwen/engine/team.py).
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit

from npqwen.simd.llvm import I32, VOID, Array, Int, call, operation

# Slots of a team's state, int64, each on a cache line of its own.
ARRIVED, GENERATION, NEXT, STOP, MEMBERS = 0, 16, 32, 48, 64
SLOTS = 80
SPINS = 4000
"""Polls of the barrier, about 50 microseconds, before a waiting thread yields its processor to others."""


class Interrupted(Exception):
    """The team was stopped before its work was done."""


def _yield_address() -> int:
    """The address of the operating system's function that lets another thread run."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


llvmlite.binding.add_symbol("npqwen_yield", _yield_address())


@operation
def fetch_add(b: ir.IRBuilder, state: Array, slot: Int, n: Int) -> Int:
    """Add n to a slot atomically; returns the old value."""
    return b.atomic_rmw("add", b.gep(state, [slot]), n, "acq_rel")


@operation
def acquire(b: ir.IRBuilder, state: Array, slot: Int) -> Int:
    """Read a slot; everything written before the `release` that set its value is then visible."""
    return b.load_atomic(b.gep(state, [slot]), "acquire", 8)


@operation
def release(b: ir.IRBuilder, state: Array, slot: Int, n: Int) -> None:
    """Write a slot; a thread that acquires the value sees everything this thread has written."""
    b.store_atomic(n, b.gep(state, [slot]), "release", 8)


@operation
def pause(b: ir.IRBuilder) -> None:
    """The processor's hint that this thread is spinning."""
    target = llvmlite.binding.get_process_triple()
    if target.startswith(("x86_64", "i686")):
        call(b, "llvm.x86.sse2.pause", VOID)
    elif target.startswith(("aarch64", "arm64")):
        call(b, "llvm.aarch64.hint", VOID, I32(1))


@operation
def yield_thread(b: ir.IRBuilder) -> None:
    """Let another thread run."""
    call(b, "npqwen_yield", I32)


@njit(nogil=True)
def barrier(team: Any) -> None:
    """Wait until all members of a team have called it; raises Interrupted in all of them if the team is stopped.

    team: its state, int64 (SLOTS,).
    """
    generation = acquire(team, GENERATION)
    if fetch_add(team, ARRIVED, 1) == acquire(team, MEMBERS) - 1:
        release(team, ARRIVED, 0)
        release(team, NEXT, 0)
        # The last to arrive decides for all: an odd generation means stopped.
        stop = 1 if acquire(team, STOP) else 0
        release(team, GENERATION, (generation | 1) + 1 + stop)
    else:
        spins = 0
        while acquire(team, GENERATION) == generation:
            spins += 1
            if spins < SPINS:
                pause()
            else:
                yield_thread()
    if acquire(team, GENERATION) & 1:
        raise Interrupted


@njit(nogil=True)
def claim(team: Any, count: int) -> int:
    """Claim the next `count` items of this step's work; returns the index of the first.

    It is past the last item when none are left, and always once the team is stopped.
    """
    if acquire(team, STOP):
        return 1 << 60
    return fetch_add(team, NEXT, count)
