"""Signals during a conversation: Ctrl-C ends the thinking or the answer, no signal leaves the terminal without echo."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from npqwen.generation.watches import ThinkingBudget

if TYPE_CHECKING:
    from npqwen.generation.watched import Watched

_RESET = "\x1b[?2004l\x1b[?25h"
"""Bracketed paste off, cursor visible."""


class AnswerInterrupts:
    """What Ctrl-C does during one answer.

    While the model thinks, the first Ctrl-C ends the thinking, as a thinking budget does: the answer follows.
    Otherwise it raises KeyboardInterrupt, once; later ones are ignored, as they would disturb the cleanup.

    ends_thinking: whether the thinking can be ended. on_end: called when it is about to be ended.
    """

    def __init__(self, ends_thinking: bool, on_end: Callable[[], None]) -> None:
        self._ends_thinking = ends_thinking
        self._on_end = on_end
        self._text: Watched | None = None
        self._requested = False
        self._end: ThinkingBudget | None = None
        self._raises = False

    def watch(self, text: Watched) -> None:
        """End the thinking if requested. For the generation option `watch`: a signal handler must not change a text."""
        self._text = text
        if not self._requested or not text.thinking.is_open:
            return
        if self._end is None:
            self._end = ThinkingBudget(text.thinking.length, by="caller")
            self._on_end()
        self._end(text)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle Ctrl-C in this context, in the main thread; outside `raising`, it is ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """A context in which Ctrl-C may raise KeyboardInterrupt."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._raises:
            return
        thinks = self._text is not None and self._text.thinking.is_open
        if thinks and self._ends_thinking and not self._requested:
            self._requested = True
        else:
            self._raises = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def restored_terminal() -> Iterator[None]:
    """Restore the terminal's settings before SIGTERM, SIGHUP or SIGQUIT ends the process.

    The signal still terminates the process. Signals that are ignored stay ignored.
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
