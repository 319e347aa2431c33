"""While Numba compiles: reports of its progress, and Ctrl-C, which would be lost inside LLVM."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event

from npqwen.kernels.compile_lock import WAITING

FUNCTIONS = 95
"""The approximate number of functions that the first run of a dense model compiles, for the progress display."""


class _Counter(event.Listener):
    """Reports each function when Numba begins to compile it, or begins to wait for another process that does."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.count = 0
        self.has_reported = False
        self.report = report

    def on_start(self, event: Any) -> None:
        self.has_reported = True
        self.report(min(self.count, FUNCTIONS - 1), FUNCTIONS)
        if event.kind != WAITING:
            self.count += 1

    def on_end(self, event: Any) -> None:
        pass


@contextmanager
def reporting(on_compile: Callable[[int, int], None] | None) -> Iterator[None]:
    """Call on_compile(done, total) as functions are compiled inside the `with` block; never if none are."""
    if on_compile is None:
        yield
        return
    counter = _Counter(on_compile)
    with event.install_listener("numba:compile", counter), event.install_listener(WAITING, counter):
        yield
    if counter.has_reported:
        on_compile(FUNCTIONS, FUNCTIONS)


class _Interrupt(event.Listener):
    """A Ctrl-C that arrived in a callback from LLVM, where Python only prints it: raised before the next compiler pass
    of the same thread."""

    def __init__(self) -> None:
        self.is_pending = False
        self._thread = threading.get_ident()

    def on_start(self, event: Any) -> None:
        if self.is_pending and threading.get_ident() == self._thread:
            raise KeyboardInterrupt

    def on_end(self, event: Any) -> None:
        pass


@contextmanager
def raising_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt if Ctrl-C arrives in a callback from LLVM: between two passes, at the latest at the end.

    What the interrupted callback broke may raise something else first, which is replaced. Ctrl-C reaches the main
    thread only; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, interrupt = sys.unraisablehook, _Interrupt()

    def hook(ignored: sys.UnraisableHookArgs, /) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            interrupt.is_pending = True
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        with event.install_listener("numba:run_pass", interrupt):
            yield
    except Exception:
        if interrupt.is_pending:
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = before
    if interrupt.is_pending:
        raise KeyboardInterrupt
