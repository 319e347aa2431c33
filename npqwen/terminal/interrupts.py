"""Signals during a conversation: Ctrl-C stops one answer, and no signal leaves the terminal without echo."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_RESET = "\x1b[?2004l\x1b[?25h"
"""Bracketed paste off, cursor visible."""


@contextlib.contextmanager
def one_interrupt() -> Iterator[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt and ignore the following ones, which would disturb the cleanup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def restored_terminal() -> Iterator[None]:
    """Restore the terminal's settings before SIGTERM, SIGHUP or SIGQUIT ends the process.

    The process still ends by the signal. Signals that are ignored stay ignored.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread() or not sys.stdin.isatty():
        yield
        return
    import termios

    stdin = sys.stdin.fileno()
    settings = termios.tcgetattr(stdin)

    def handle(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError, termios.error):
            if os.tcgetpgrp(stdin) == os.getpgrp():  # else changing the settings would stop the process
                termios.tcsetattr(stdin, termios.TCSANOW, settings)
                for stream in (sys.stderr, sys.stdout):
                    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
                        os.write(stream.fileno(), _RESET.encode())
                        break
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
