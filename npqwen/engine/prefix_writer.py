"""The background thread that writes pages of prefixes to files."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from npqwen.errors import OutputError

if TYPE_CHECKING:
    from npqwen.engine.prefix_files import PrefixFiles
    from npqwen.engine.prefix_page import PrefixPage

WAIT = 5.0
"""Most seconds that a page waits for the model to be idle."""
POLL = 0.02
"""Seconds between two polls of whether the model is busy; it counts as idle after three in a row that found it idle."""
PAUSE = 60.0
"""Seconds without a retry after a page could not be written."""


class PrefixWriter:
    """Writes pages one after another, when the model is idle or after WAIT seconds; the thread ends with the last one.

    The interpreter joins the thread at exit, so a program that does not close its model loses nothing.
    """

    def __init__(self, files: PrefixFiles, busy: Callable[[], bool]) -> None:
        """busy: returns whether a pass is running."""
        self._files = files
        self._busy = busy
        self._lock = threading.Lock()
        self._waiting: dict[bytes, PrefixPage] = {}
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._idle = 0
        """How many polls in a row found the model idle."""
        self._again = 0.0
        """The `time.monotonic()` before which nothing is queued."""
        self._problem: str | None = None
        self._failing = False

    def put(self, pages: Iterable[PrefixPage], most: int) -> None:
        """Queue pages to be written, or their time of use to be updated. most: how many may wait; others are left out.
        """
        with self._lock:
            if time.monotonic() < self._again:
                return
            for page in pages:
                if page.key not in self._waiting and len(self._waiting) >= most:
                    break
                self._waiting[page.key] = page
            if self._waiting and (self._thread is None or not self._thread.is_alive()):
                thread = threading.Thread(target=self._work, name="npqwen-prefixes")
                with contextlib.suppress(RuntimeError):  # the interpreter is ending
                    thread.start()
                    self._thread = thread

    def waiting(self) -> list[PrefixPage]:
        """The pages that are not written yet."""
        with self._lock:
            return list(self._waiting.values())

    def forget(self) -> bool:
        """Discard the pages that are not written yet; returns whether there were any."""
        with self._lock:
            had = bool(self._waiting)
            self._waiting = {}
            return had

    def take_problem(self) -> str | None:
        """Why a page could not be written; returned only once until a page is written again, otherwise None."""
        with self._lock:
            problem, self._problem = self._problem, None
            return problem

    def close(self) -> None:
        """Write the waiting pages; after an interrupt, only the one that is being written."""
        self._hurry.set()
        thread = self._thread
        try:
            if thread is not None and thread.is_alive():
                thread.join()
        except BaseException:
            self.forget()
            raise
        finally:
            self._hurry.clear()

    def _work(self) -> None:
        if sys.platform == "linux":  # where each thread has its own priority
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            with self._lock:
                page = next(iter(self._waiting.values()), None)
                if page is None:
                    self._thread = None
                    return
            try:
                self._wait_until_idle()
                self._files.write(page)
            except OutputError as error:
                self._failed(error)
            else:
                self._failing = False
            finally:
                with self._lock:
                    if self._waiting.get(page.key) is page:
                        del self._waiting[page.key]

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline and not self._hurry.is_set():
            self._idle = 0 if self._busy() else self._idle + 1
            if self._idle >= 3:
                return
            self._hurry.wait(POLL)

    def _failed(self, error: OutputError) -> None:
        with self._lock:
            if not self._failing:
                self._problem = f"the prefix cache cannot be written for now: {error}"
            self._failing = True
            self._again = time.monotonic() + PAUSE
            self._waiting = {}
