"""Threads that run one compiled function together and meet at barriers.

Waking a thread takes tens of microseconds, a barrier of atomics a third of one. So the threads are woken once per
forward pass, and the steps inside it are separated by barriers.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from npqwen.checks import check_whole
from npqwen.errors import ClosedError
from npqwen.kernels.barrier import MEMBERS, SLOTS, STOP


class Team:
    """A pool of sleeping worker threads, the members, that all run the same compiled function when called.

    The caller sleeps meanwhile, so that it receives Ctrl-C: the members then stop before they claim more work. For
    short work it can take the place of member 0 (see `run`). One call runs at a time; other callers wait.

    state: int64, slots for the barrier and for claiming work, see npqwen.kernels.barrier.
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
        """Start the workers; again in a forked process, where only the forking thread exists."""
        self._process = os.getpid()
        self._turn = threading.Lock()
        self._go = [_held() for _ in range(self.threads)]
        self._count = threading.Lock()
        self._job: tuple[Callable[..., None], tuple[Any, ...], threading.Lock] | None = None
        self._failure: BaseException | None = None
        self._first = 0
        for member in range(self.threads):
            threading.Thread(target=self._work, args=(member,), name=f"npqwen-{member}", daemon=True).start()

    def _work(self, member: int) -> None:
        go = self._go[member]
        while True:
            go.acquire()
            job = self._job
            # The caller wakes one member, which wakes the others: no interrupt can leave some of them asleep.
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
        """Run function(state, member, *args) in every member; returns when all have returned.

        function: compiled with nogil; it calls `barrier` equally often in all members, at least once. on_caller: run
        member 0 on the calling thread, which saves two context switches but delays Ctrl-C until the function returns:
        for short work. Raises what the function raised, KeyboardInterrupt, and ClosedError after close().
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
            # A new lock for each call: an interrupted one may leave it released.
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
                        started = True  # Python delivers no interrupt between this and the call below.
                        if self._running:
                            self._go[self._first].release()
                    if not ran:
                        ran = True  # Nor here: the others may wait at a barrier for this thread.
                        function(self.state, 0, *args)
                    if self._running:
                        # On Windows, Ctrl-C is delivered only between waits.
                        finished.acquire(timeout=0.1 if sys.platform == "win32" else -1)
                except BaseException as error:
                    interrupt = interrupt or error
            self._job = None
            if interrupt is not None:
                raise interrupt
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """End the workers, after the running call. Closing again has no effect."""
        if self._process != os.getpid():
            self._closed = True
            return
        with self._turn:
            if not self._closed:
                self._job, self._first = None, 0
                self._go[0].release()
            self._closed = True


def check_threads(threads: object) -> None:
    """Raise OptionError unless `threads` is a whole number from 1 to 1024."""
    check_whole("threads", threads, 1, 1024)


def _held() -> threading.Lock:
    """A new lock, acquired."""
    lock = threading.Lock()
    lock.acquire()
    return lock
