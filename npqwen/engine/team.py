"""Threads that run one compiled function together and meet at barriers.

Waking a thread takes tens of microseconds, a barrier of atomics a third of one: so the threads are woken once
a forward pass, and inside it every step that needs all of the step before ends in a barrier.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from npqwen.errors import ClosedError, OptionError
from npqwen.kernels.barrier import MEMBERS, SLOTS, STOP


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

    def run(self, function: Callable[..., None], *args: Any, on_caller: bool = False) -> None:
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
            self._running = self.threads - on_caller
            self._failure = None
            # A lock of this call's own: one that is interrupted may leave it free.
            finished = _held()
            self._job = function, args, finished
            self._first = int(on_caller)
            started, ran = False, not on_caller
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
