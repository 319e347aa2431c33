"""Ctrl-C that stops one thing, once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def one_interrupt() -> Iterator[None]:
    """The first Ctrl-C raises KeyboardInterrupt, those after it nothing: what then tidies up is not disturbed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    done = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal done
        if not done:
            done = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
