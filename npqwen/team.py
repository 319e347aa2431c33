"""Threads that run one compiled function together and meet at barriers.

Waking a thread takes tens of microseconds, a barrier of atomics a third of one: so the threads are woken once
a forward pass, and inside it every step that needs all of the step before ends in a barrier.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from npqwen.errors import ClosedError, OptionError

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
def take(team: Any, count: int) -> int:
    """The first of the next `count` pieces of this step's work; far past any end once asked to stop."""
    if acquire(team, STOP):
        return 1 << 60
    return fetch_add(team, NEXT, count)


class Team:
    """`threads` sleeping workers that run a compiled function together when called.

    The caller sleeps meanwhile, so that Ctrl-C reaches it, and the workers stop at the next piece of their work; or it
    takes part where that is soon done (see `run`).  One call at a time; other callers wait their turn.
    """

    def __init__(self, threads: int) -> None:
        """Raises OptionError unless threads is 1 to 1024."""
        check_threads(threads)
        self.threads = threads
        self.state = np.zeros(SLOTS, np.int64)
        self._turn = threading.Lock()
        self._process = 0
        self._closed = False
        self._start()

    def _start(self) -> None:
        """Start the workers, once a process: threads do not survive a fork."""
        self._process = os.getpid()
        self._turn = threading.Lock()
        self._go = [_held() for _ in range(self.threads)]
        self._count = threading.Lock()
        self._job: tuple[Callable[..., None], tuple[Any, ...], threading.Lock] | None = None
        self._failure: BaseException | None = None
        self._first = 0
        for member in range(self.threads):
            threading.Thread(
                target=self._work, args=(member,), name=f"npqwen-{member}", daemon=True
            ).start()

    def _work(self, member: int) -> None:
        go = self._go[member]
        while True:
            go.acquire()
            job = self._job
            # One release starts them all: no interrupt can come after some.
            if member == self._first:
                for other in self._go[member + 1 :]:
                    other.release()
            if job is None:
                return
            function, args, finished = job
            try:
                function(self.state, member, *args)
            except BaseException as failure:
                self._failure = failure
            del job, function, args
            with self._count:
                self._running -= 1
                if not self._running:
                    finished.release()

    def run(self, function: Callable[..., None], *args: Any, here: bool = False) -> None:
        """function(state, member, *args) in every member; returns when all are done.

        The function is compiled with nogil, and calls `barrier` equally often in all members, at least once.  here:
        the calling thread is the first member, which saves waking another and being woken, but it hears Ctrl-C only
        when the work is done: for work that is soon done.  Raises what the function raised; KeyboardInterrupt, unless
        here, within one piece of its work.  ClosedError after close().
        """
        if self._process != os.getpid():
            self._start()
        with self._turn:
            if self._closed:
                raise ClosedError("the model is closed; load it again")
            self.state[:] = 0
            self.state[MEMBERS] = self.threads
            self._running = self.threads - here
            self._failure = None
            # A lock of this call's own: one that is interrupted may leave it free.
            finished = _held()
            self._job = function, args, finished
            self._first = int(here)
            started, ran = False, not here
            interrupt: BaseException | None = None
            while self._running or not ran:
                try:
                    if interrupt is not None:
                        self.state[STOP] = 1
                    if not started:
                        if interrupt is not None:
                            break
                        started = True  # No interrupt comes between this and the call below.
                        if self._running:
                            self._go[self._first].release()
                    if not ran:
                        ran = True  # Nor here: others may wait for this thread, it has to take part.
                        function(self.state, 0, *args)
                    if self._running:
                        # Windows answers Ctrl-C only between waits.
                        finished.acquire(timeout=0.1 if sys.platform == "win32" else -1)
                except BaseException as error:
                    interrupt = interrupt or error
            self._job = None
            if interrupt is not None:
                raise interrupt
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """End the workers, after the call under way.  A second close does nothing."""
        if self._process != os.getpid():
            self._closed = True
            return
        with self._turn:
            if not self._closed:
                self._job, self._first = None, 0
                self._go[0].release()
            self._closed = True


def check_threads(threads: object) -> None:
    """Raise OptionError for what is no number of threads."""
    if not isinstance(threads, int | np.integer) or isinstance(threads, bool) or not 1 <= threads <= 1024:
        raise OptionError(f"threads is {threads!r}; give 1 to 1024, best the number of performance cores")


def _held() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock
