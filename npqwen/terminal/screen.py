"""What a conversation needs of a terminal beyond lines: dim text, moving back over what was written, quiet keys."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator

from npqwen.terminal.console import Console
from npqwen.terminal.control_characters import without_control_characters

DIM, PLAIN = "\x1b[2m", "\x1b[22m"
_VIRTUAL_TERMINAL = 0x0004


class Terminal:
    """Writes for people. The answer's text goes to stdout, all else to stderr.

    Only on a terminal is anything dimmed (not if NO_COLOR is set) or ever written over. A quiet console leaves out
    notices and what is written over.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        obeys = sys.stderr.isatty() and _understands_sequences()
        self.live = obeys and not console.quiet
        """Whether to write to stderr what is taken back later."""
        self.dims = obeys and not os.environ.get("NO_COLOR")
        self._at_line_start = True

    @property
    def columns(self) -> int:
        """The terminal's width now."""
        return max(_size().columns, 8)

    @property
    def rows(self) -> int:
        """The terminal's height now."""
        return max(_size().lines, 4)

    def dim(self, text: str) -> str:
        """The text without control characters, dim where that is possible."""
        text = self._plain(text)
        return f"{DIM}{text}{PLAIN}" if self.dims and text else text

    def notice(self, line: str) -> None:
        """One dim line."""
        self.end_line()
        self.console.notice(self.dim(self._fitted(" ".join(line.split()))))

    def tell(self, text: str, *, dim: bool = False) -> None:
        """Lines that somebody asked for: never left out."""
        self.end_line()
        self.console.end_bar()
        text = self._fitted(text)
        self.error_text((self.dim(text) if dim else self._plain(text)) + "\n")

    def error(self, line: str) -> None:
        """One line that is never left out."""
        self.tell(f"error: {' '.join(line.split())}")

    def gap(self) -> None:
        """An empty line before the next question."""
        if sys.stderr.isatty():
            self.error_text("\n")

    def error_text(self, text: str) -> None:
        """Write to stderr as it is."""
        sys.stderr.write(text)
        sys.stderr.flush()

    def answer(self, text: str) -> None:
        """A piece of the answer."""
        if text:
            self.console.text(text)
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """End the answer's last line on a terminal, if it is not ended."""
        if not self._at_line_start:
            self._at_line_start = True
            self.console.end_line()

    def _plain(self, text: str) -> str:
        return without_control_characters(text) if sys.stderr.isatty() else text

    def _fitted(self, text: str) -> str:
        """On a terminal, lines broken between words where they would be broken within one."""
        if not sys.stderr.isatty():
            return text
        columns = self.columns
        lines: list[str] = []
        for line in text.split("\n"):
            indent = line[: len(line) - len(line.lstrip())][: columns // 2]
            fits = len(line) < columns
            lines += [line] if fits else textwrap.wrap(line, columns - 1, subsequent_indent=indent)
        return "\n".join(lines)

    @contextlib.contextmanager
    def quiet_keys(self) -> Iterator[None]:
        """What is typed in the meantime is not shown, and is there for the next line that is read."""
        if sys.platform == "win32" or not sys.stdin.isatty() or not _in_foreground(sys.stdin.fileno()):
            yield
            return
        import termios

        stdin = sys.stdin.fileno()
        before = termios.tcgetattr(stdin)
        quiet = termios.tcgetattr(stdin)
        quiet[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(stdin, termios.TCSADRAIN, quiet)
            yield
        finally:
            if _in_foreground(stdin):
                termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _in_foreground(terminal: int) -> bool:
    """Whether the terminal serves this process now. In the background, changing its settings would stop the process."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False


def _size() -> os.terminal_size:
    """That of stderr's terminal: stdout may be a file."""
    with contextlib.suppress(OSError, ValueError):  # none, or no file
        size = os.get_terminal_size(sys.stderr.fileno())
        if size.columns and size.lines:
            return size
    size = shutil.get_terminal_size()
    return os.terminal_size((size.columns or 80, size.lines or 24))  # before Python 3.11, zeros pass


def _understands_sequences() -> bool:
    """Whether stderr's terminal obeys ANSI sequences; on Windows it is told to."""
    if sys.platform != "win32":
        return os.environ.get("TERM", "dumb") != "dumb"
    import ctypes
    import msvcrt

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    mode = ctypes.c_uint32()
    try:
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(sys.stderr.fileno()))
    except OSError:
        return False
    if not kernel.GetConsoleMode(handle, ctypes.byref(mode)):
        return False
    return bool(kernel.SetConsoleMode(handle, mode.value | _VIRTUAL_TERMINAL))
