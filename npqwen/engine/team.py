"""Threads that run one compiled function together, step by step.

Waking a thread takes tens of microseconds, a step synchronized by atomics a third of one (npqwen/kernels/pieces.py). So
the threads are woken once per forward pass.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npqwen.checks import check_whole
from npqwen.errors import ClosedError, OutOfMemoryError
from npqwen.kernels.pieces import INSIDE, LAST_STEP, STEP, STOP, Interrupted, clear, new_state, next_step

_POLL_SECONDS = 1e-3
_LONGEST = 1 << 20
"""More steps than any function has."""


@dataclass(frozen=True)
class _Job:
    """One call of the team."""

    function: Callable[..., None]
    args: tuple[Any, ...]
    first: int
    """The first member that runs it on a thread of its own."""
    first_step: int
    finished: threading.Lock
    """Held until the first member returns."""
    failures: list[BaseException]
    keep: object
    """Owns what the function reads besides the arguments: a late member may still read it after the call returns."""


class Team:
    """A pool of sleeping worker threads, the members, that all run the same compiled function when called.

    The caller sleeps meanwhile, so that it receives Ctrl-C: the members then stop before they claim more work. For
    short work it can take the place of member 0 (see `run`). One call runs at a time; other callers wait.

    A call returns when its work is done. A member that the system has preempted may then still be inside it, even while
    a later call runs: it writes to its own memory only, and nobody waits for it.
    """

    def __init__(self, threads: int) -> None:
        """Raises OptionError unless threads is 1 to 1024, OutOfMemoryError if the system cannot start them."""
        check_threads(threads)
        self.threads = threads
        self._turn = threading.Lock()
        self._process = 0
        self._closed = False
        self._start()

    def _start(self) -> None:
        """Start the workers; again in a forked process, where only the forking thread exists."""
        self._process = os.getpid()
        self._turn = threading.Lock()
        self.state = new_state(self.threads)
        self._go = [_held() for _ in range(self.threads)]
        self._entering = threading.Lock()
        self._job: _Job | None = None
        for member in range(self.threads):
            try:
                threading.Thread(target=self._work, args=(member,), name=f"npqwen-{member}", daemon=True).start()
            except RuntimeError:  # a limit of threads or memory
                self._closed = True
                for go in self._go:
                    _release(go)
                raise OutOfMemoryError(
                    f"the system refused thread {member + 1} of {self.threads}; use fewer (--threads)"
                ) from None

    def row(self, member: int) -> Any:
        """A member's row of the state, which it passes to the functions of npqwen/kernels/pieces.py."""
        return self.state[1 + member]

    def _work(self, member: int) -> None:
        go, row = self._go[member], self.row(member)
        while True:
            go.acquire()
            self._wake_after(member)
            with self._entering:
                job = self._job
                if job is None and self._closed:
                    return
                if job is None or member < job.first:
                    continue
                row[STEP] = job.first_step
                row[INSIDE] = 1
            try:
                job.function(row, member, *job.args)
            except BaseException as failure:
                job.failures.append(failure)
                with self._entering:
                    if self._job is job:
                        self.state[0, STOP] = 1
            row[INSIDE] = 0
            _release(job.finished)
            del job

    def _wake_after(self, member: int) -> None:
        """Wake two other members, each of which wakes two more: a late one keeps few others asleep."""
        for other in self._go[2 * member + 1 : 2 * member + 3]:
            _release(other)

    def run(self, function: Callable[..., None], *args: Any, on_caller: bool = False, keep: object = None) -> None:
        """Run function(row, member, *args) in every member; returns when the first has returned.

        function: compiled with nogil. All of its work is claimed in steps (npqwen/kernels/pieces.py), so that it is
        done when one member returns; any other memory that a member writes is its own. on_caller: run member 0 on the
        calling thread, which saves two context switches but delays Ctrl-C until the function returns: for short work.
        keep: owns the memory that the function reads at addresses. Raises what the function raised, KeyboardInterrupt,
        and ClosedError after close().
        """
        if self._process != os.getpid():
            self._start()
        with self._turn:
            if self._closed:
                raise ClosedError("the model is closed; load it again")
            if self._job is not None or next_step(self.state) > LAST_STEP - _LONGEST:
                self._settle()  # an interrupt came while a call was being stopped, or step numbers are exhausted
            job = _Job(function, args, int(on_caller), next_step(self.state), _held(), [], keep)
            try:
                with self._entering:
                    self._job = job
                if on_caller:
                    self._run_as_first(job)
                else:
                    _release(self._go[0])
                    # On Windows, Ctrl-C is delivered only between waits.
                    while not job.finished.acquire(timeout=0.1 if sys.platform == "win32" else -1):
                        pass
                if job.failures:
                    raise job.failures[0]
            except BaseException as error:
                self._settle()
                if isinstance(error, Interrupted) and job.failures:
                    raise job.failures[0] from None
                raise
            self._job = None

    def _run_as_first(self, job: _Job) -> None:
        """Take the place of member 0."""
        row = self.row(0)
        while row[INSIDE]:  # its own thread is late
            time.sleep(_POLL_SECONDS)
        row[STEP] = job.first_step
        self._wake_after(0)
        job.function(row, 0, *job.args)

    def _settle(self) -> None:
        """Stop the running call, wait until all members have left it and earlier ones, and restart step numbers."""
        with self._entering:
            self._job = None
        self.state[0, STOP] = 1
        self._wait_for_members()
        clear(self.state)

    def _wait_for_members(self) -> None:
        """Wait until all members have returned from the functions that they run."""
        polls = 0
        while self.state[1:, INSIDE].any():
            polls += 1
            if sys.is_finalizing() and polls > 100:  # a thread that needs the interpreter would never return
                return
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """End the workers, after the running call. Closing again has no effect."""
        if self._process != os.getpid():
            self._closed = True
            return
        with self._turn:
            if self._closed:
                return
            self._closed = True
            with self._entering:
                self._job = None
            self._wait_for_members()
            for go in self._go:
                _release(go)


def check_threads(threads: object) -> None:
    """Raise OptionError unless `threads` is a whole number from 1 to 1024."""
    check_whole("threads", threads, 1, 1024)


def _held() -> threading.Lock:
    """A new lock, acquired."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def _release(lock: threading.Lock) -> None:
    """Release a lock, if it is acquired."""
    with contextlib.suppress(RuntimeError):
        lock.release()
