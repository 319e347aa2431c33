"""How a team of threads shares work, in steps of pieces: claiming them, and waiting until all are finished. For
compiled code only.

Every thread goes through the same steps in the same order. It claims pieces of a step until none are left, and `claim`
then returns when all are *finished*, not when all threads have arrived: a thread that the system has descheduled finds
the steps that it missed complete, and catches up. The piece of the running step that it holds is recomputed by others,
if it is private: a thread keeps such a piece's results to itself until `finish_first` says that it is the first to
finish it.

One word holds the running step and how many of its pieces are claimed and finished, so that finishing a piece and
claiming the next is one atomic operation, and a late thread cannot claim from a step that it does not know. Whatever a
thread reads before it claims a piece was stable, or the claim would have failed.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit
from numpy.typing import NDArray

from npqwen.simd.llvm import I32, I64, VOID, Array, Int, call, operation
from npqwen.simd.scalar import memory

ROW = 16
"""int64 of a row of a team's state: two cache lines."""
# Row 0, the team's. STOP: not 0 to interrupt the function that is running.
STATE, STOP = 0, 8
# A member's row. Others read the first cache line: the private piece that the member computes, and whether it is still
# inside the function. The rest is the member's own.
_HELD, INSIDE = 0, 1
_TEAM, MEMBERS, STEP, _UNCOUNTED, _HOLDER, _HOLDING, _BEGAN, _PANELS = range(8, 16)
_PACE = 2
"""Ticks per piece, the average of the member's pieces in the last step."""

_COUNT_BITS = 20
MOST_PIECES = (1 << _COUNT_BITS) - 1
"""The most pieces in a step."""
_FINISHED = 1 << _COUNT_BITS
_STEP_SHIFT = 2 * _COUNT_BITS
LAST_STEP = (1 << (63 - _STEP_SHIFT)) - 1
RECOMPUTE_POLLS = 500
"""Polls, at least 6 microseconds, before a waiting thread recomputes a piece that another holds."""
SPINS = 4000
"""Polls, about 50 microseconds, before a waiting thread yields its processor to others."""


class Interrupted(Exception):
    """The team was stopped before its work was done."""


def new_state(members: int) -> NDArray[np.int64]:
    """The state of a team: int64 (1 + members, ROW). Row 1 + m is what member m passes to the functions of this file.

    The array must outlive their calls: rows hold its address.
    """
    raw = np.zeros((members + 2) * ROW, np.int64)
    start = -raw.ctypes.data // raw.itemsize % ROW
    state = raw[start : start + (members + 1) * ROW].reshape(members + 1, ROW)
    state[1:, _TEAM] = state.ctypes.data
    state[1:, MEMBERS] = members
    state[1:, STEP] = 1
    return state


def next_step(state: NDArray[np.int64]) -> int:
    """The first step that no member has begun."""
    return (int(state[0, STATE]) >> _STEP_SHIFT) + 1


def clear(state: NDArray[np.int64]) -> None:
    """Restart the numbering of steps, and clear STOP; no member may be inside a function."""
    state[0, STATE] = state[0, STOP] = 0
    state[1:, _HELD] = 0
    state[1:, _UNCOUNTED] = state[1:, _PANELS] = 0


def _yield_address() -> int:
    """The address of the operating system's function that lets another thread run."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


llvmlite.binding.add_symbol("npqwen_yield", _yield_address())
llvmlite.binding.initialize_native_asmparser()  # AArch64's clock is read by an instruction in assembly


@operation
def _exchange(b: ir.IRBuilder, array: Array, slot: Int, expected: Int, new: Int) -> Int:
    """Compare and swap: write a slot atomically if it has the expected value; return its previous value."""
    pair = b.cmpxchg(b.gep(array, [slot]), expected, new, "acq_rel", "acquire")
    return b.extract_value(pair, 0)


@operation
def _acquire(b: ir.IRBuilder, array: Array, slot: Int) -> Int:
    """Read a slot; everything written before the `_release` that set its value is then visible."""
    return b.load_atomic(b.gep(array, [slot]), "acquire", 8)


@operation
def _release(b: ir.IRBuilder, array: Array, slot: Int, n: Int) -> None:
    """Write a slot; a thread that acquires the value sees everything this thread has written."""
    b.store_atomic(n, b.gep(array, [slot]), "release", 8)


@operation
def _fence(b: ir.IRBuilder) -> None:
    """Complete all earlier reads before any later one."""
    b.fence("acquire")


@operation
def pause(b: ir.IRBuilder) -> None:
    """The processor's hint that this thread is spinning."""
    target = llvmlite.binding.get_process_triple()
    if target.startswith(("x86_64", "i686")):
        call(b, "llvm.x86.sse2.pause", VOID)
    elif target.startswith(("aarch64", "arm64")):
        call(b, "llvm.aarch64.hint", VOID, I32(1))


@operation
def ticks(b: ir.IRBuilder) -> Int:
    """A clock of constant but unspecified rate; 0 on a processor without one."""
    target = llvmlite.binding.get_process_triple()
    if target.startswith(("x86_64", "i686")):
        return call(b, "llvm.readcyclecounter", I64)
    if target.startswith(("aarch64", "arm64")):
        return b.asm(ir.FunctionType(I64, []), "mrs $0, cntvct_el0", "=r", [], side_effect=True)
    return I64(0)


@operation
def _yield_thread(b: ir.IRBuilder) -> None:
    """Let another thread run."""
    call(b, "npqwen_yield", I32)


@njit(nogil=True)
def _rows(team: Any) -> Any:
    """All rows of the state that a member's row belongs to."""
    return memory(team[_TEAM], (1 + team[MEMBERS]) * ROW, np.int64)


@njit(nogil=True)
def claim(team: Any, pieces: int) -> int:
    """Claim one of the `pieces` of this step; this marks the piece that this thread claimed before as finished.

    team: this member's row of the state. Returns the index of the piece, ascending unless it is another thread's (see
    `claim_private`); `pieces` once all are finished, and the next call then concerns the next step. Raises Interrupted
    once the team is stopped.
    """
    rows, step = _rows(team), team[STEP]
    finished, team[_UNCOUNTED] = team[_UNCOUNTED], 0
    if _acquire(rows, STOP):
        raise Interrupted
    word = _acquire(rows, STATE)
    while True:
        running = word >> _STEP_SHIFT
        if running > step or (running < step and pieces == 0):
            team[STEP], team[_PANELS] = step + 1, 0
            return pieces
        # The first thread to reach a step begins it: the previous one is complete.
        new = word + finished * _FINISHED if running == step else step << _STEP_SHIFT
        piece = new & MOST_PIECES
        if piece < pieces:
            new += 1
        elif not finished:
            return _wait(team, rows, step, pieces)
        found = _exchange(rows, STATE, word, new)
        if found == word:
            break
        word = found
    if piece >= pieces:
        return _wait(team, rows, step, pieces)
    if team[_PANELS] == 0:
        team[_BEGAN] = ticks()
    team[_PANELS] += 1
    team[_UNCOUNTED], team[_HOLDER] = 1, 0
    return piece


@njit(nogil=True)
def claim_private(team: Any, pieces: int) -> int:
    """Claim a piece as `claim` does; its results stay private to this thread until `finish_first` returns true.

    It may be a piece that another thread has held for long: that thread may not be running.
    """
    piece = claim(team, pieces)
    team[_UNCOUNTED] = 0
    if piece < pieces and team[_HOLDER] == 0:
        own = (team.ctypes.data - team[_TEAM]) // team.itemsize
        # claim has counted the piece, so the step is still this one.
        team[_HOLDER], team[_HOLDING] = own, team[STEP] << _COUNT_BITS | piece
        _release(team, _HELD, team[_HOLDING])
    return piece


@njit(nogil=True)
def is_needed(team: Any) -> bool:
    """Whether nobody has finished this thread's private piece; if so, what it has read since the claim was stable."""
    _fence()
    return _acquire(_rows(team), team[_HOLDER] + _HELD) == team[_HOLDING]


@njit(nogil=True)
def finish_first(team: Any) -> bool:
    """Whether this thread is the first to finish its private piece. If so, it must write the results before it claims
    another; if not, it must write nothing."""
    first = _exchange(_rows(team), team[_HOLDER] + _HELD, team[_HOLDING], 0) == team[_HOLDING]
    team[_UNCOUNTED] = 1 if first else 0
    return first


@njit(nogil=True)
def _wait(team: Any, rows: Any, step: int, pieces: int) -> int:
    """Wait until all pieces of a step are finished, and return `pieces`; or the index of one to recompute."""
    began = ticks()
    if team[_PANELS]:
        team[_PACE] = (began - team[_BEGAN]) // team[_PANELS]
        team[_PANELS] = 0
    polls = 0
    while True:
        word = _acquire(rows, STATE)
        if word >> _STEP_SHIFT > step or (word >> _COUNT_BITS) & MOST_PIECES >= pieces:
            team[STEP] = step + 1
            return pieces
        if _acquire(rows, STOP):
            raise Interrupted
        polls += 1
        # A running thread should have finished its piece by then.
        if polls > RECOMPUTE_POLLS and ticks() - began >= 2 * team[_PACE]:
            for holder in range(ROW, rows.size, ROW):
                held = _acquire(rows, holder + _HELD)
                if held >> _COUNT_BITS == step:
                    team[_HOLDER], team[_HOLDING] = holder, held
                    return held & MOST_PIECES
        if polls < SPINS:
            pause()
        else:
            _yield_thread()


@njit(nogil=True)
def leave(team: Any) -> None:
    """Tell the team that this member is about to return: it no longer reads or writes any of the function's data."""
    _release(team, INSIDE, 0)
