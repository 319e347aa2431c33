"""Atomics that threads of a team share work and wait with: compiled code only.

A barrier of atomics takes a third of a microsecond; waking a thread takes tens of them (npqwen/engine/team.py).
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Slots of a team's state, int64, each on a cache line of its own.
ARRIVED, GENERATION, NEXT, STOP, MEMBERS = 0, 16, 32, 48, 64
SLOTS = 80
SPINS = 4000
"""Looks at the barrier before a waiting thread offers its processor to others, about 50 microseconds."""


class Interrupted(Exception):
    """The team was asked to stop before its work was done."""


def _give_way() -> int:
    """The address of the operating system's call that lets another thread run."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


llvmlite.binding.add_symbol("npqwen_give_way", _give_way())


def _slot(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return b.gep(context.make_array(sig.args[0])(context, b, args[0]).data, [args[1]])


@intrinsic
def fetch_add(_: Any, state: Any, slot: Any, n: Any) -> Any:
    """Add n to a slot in one indivisible step; what was there before."""
    sig = types.int64(state, types.int64, types.int64)
    return sig, lambda context, b, sig, a: b.atomic_rmw("add", _slot(context, b, sig, a), a[2], "acq_rel")


@intrinsic
def acquire(_: Any, state: Any, slot: Any) -> Any:
    """Read a slot, and see all that was written before it was released."""
    sig = types.int64(state, types.int64)
    return sig, lambda context, b, sig, a: b.load_atomic(_slot(context, b, sig, a), "acquire", 8)


@intrinsic
def release(_: Any, state: Any, slot: Any, n: Any) -> Any:
    """Write a slot, after all that was written before it."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, a: Any) -> Any:
        b.store_atomic(a[2], _slot(context, b, sig, a), "release", 8)
        return context.get_dummy_value()

    return types.void(state, types.int64, types.int64), generate


@intrinsic
def pause(_: Any) -> Any:
    """The processor's hint that this thread is only waiting."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        target = llvmlite.binding.get_process_triple()
        nothing = ir.FunctionType(ir.VoidType(), [])
        if target.startswith(("x86_64", "i686")):
            b.call(cgutils.get_or_insert_function(b.module, nothing, "llvm.x86.sse2.pause"), [])
        elif target.startswith(("aarch64", "arm64")):
            hint = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            function = cgutils.get_or_insert_function(b.module, hint, "llvm.aarch64.hint")
            b.call(function, [ir.IntType(32)(1)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(_: Any) -> Any:
    """Let another thread run."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        b.call(cgutils.get_or_insert_function(b.module, kind, "npqwen_give_way"), [])
        return context.get_dummy_value()

    return types.void(), generate


@njit(nogil=True)
def barrier(team: Any) -> None:
    """All members wait here for the last one; raises Interrupted in all of them if asked to stop."""
    generation = acquire(team, GENERATION)
    if fetch_add(team, ARRIVED, 1) == acquire(team, MEMBERS) - 1:
        release(team, ARRIVED, 0)
        release(team, NEXT, 0)
        # The last one decides for all: they see the same generation.
        stop = 1 if acquire(team, STOP) else 0
        release(team, GENERATION, (generation | 1) + 1 + stop)
    else:
        spins = 0
        while acquire(team, GENERATION) == generation:
            spins += 1
            if spins < SPINS:
                pause()
            else:
                give_way()
    if acquire(team, GENERATION) & 1:
        raise Interrupted


@njit(nogil=True)
def claim(team: Any, count: int) -> int:
    """The first of the next `count` pieces of this step's work; far past any end once asked to stop."""
    if acquire(team, STOP):
        return 1 << 60
    return fetch_add(team, NEXT, count)
