"""Output of the commands: the model's text to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from npqwen.errors import OutputError
from npqwen.progress import Bars, Progress
from npqwen.terminal.row_printer import RowPrinter
from npqwen.terminal.styles import PLAIN
from npqwen.terminal.word_wrap import WordWrap

DIM, NOT_DIM = "\x1b[2m", "\x1b[22m"
ERROR_LENGTH = 1000
"""Longest line of an error message, in characters."""
_CONTROL_CHARACTERS = {
    code: None for code in (*range(0x20), *range(0x7F, 0xA0), 0x202D, 0x202E) if chr(code) not in "\n\t"
}
_ENABLE_VIRTUAL_TERMINAL_PROCESSING = 0x0004


class Terminal:
    """Writes a model's text to stdout, and notices, progress bars, statistics and reasoning to stderr.

    Text is UTF-8 whatever the locale, and flushed immediately. Text for a terminal contains no control characters but
    newline and tab, except the escape sequences that this package writes itself; text for a file or pipe is not
    changed. Lines are dim (unless NO_COLOR is set), wrapped and overwritten only on a terminal. Where a line could end
    up in a row of text, for example because stdout is a pipe, it begins a new row.

    quiet: leave out notices, progress bars, and everything that would be overwritten later. On exit from the context,
    an unfinished progress bar is removed.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        ansi = _understands_ansi(sys.stderr)
        self.quiet = quiet
        self.redraws = ansi and not quiet
        """Whether text on stderr may be overwritten later."""
        self.draws_text = _understands_ansi(sys.stdout)
        """Whether stdout is a terminal that understands escape sequences."""
        self.styles_text = self.draws_text and not os.environ.get("NO_COLOR")
        """Whether text on stdout may be styled."""
        self._dims = ansi and not os.environ.get("NO_COLOR")
        self._line_open = False
        """Whether the last text on stdout did not end with a newline."""
        self._text_is_new = False
        """Whether there has been text since the last line on stderr."""
        self._told_of_compiling = False
        self._bars = Bars(self.shows_bars, transient=True)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # the error handler of paths
            if not sys.stdout.isatty():
                sys.stdout.reconfigure(newline="\n")  # text for files and pipes is not changed, on Windows neither

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.clear_bar()
        text_ended = self._text_is_new and not self._line_open and sys.stdout.isatty()
        if kind is KeyboardInterrupt and sys.stderr.isatty() and not text_ended:
            self.write_error("\n")  # after the ^C that the terminal shows

    @property
    def shows_bars(self) -> bool:
        """Whether progress bars are shown."""
        return not self.quiet and sys.stderr.isatty()

    @property
    def columns(self) -> int:
        """The current width of the terminal."""
        return max(_size(sys.stderr).columns, 8)

    @property
    def rows(self) -> int:
        """The current height of the terminal."""
        return max(_size(sys.stderr).lines, 4)

    # --- stdout ---

    def text(self, text: str) -> None:
        """Write text to stdout, on a terminal without control characters. Raises what `write_text` does."""
        self.write_text(without_control_characters(text) if sys.stdout.isatty() else text)

    def write_text(self, text: str) -> None:
        """Write `text`, escape sequences included, to stdout.

        Raises BrokenPipeError if the reader has closed the pipe, OutputError for other failures.
        """
        if not text:
            return
        self._line_open, self._text_is_new = not text.endswith("\n"), True
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            self._text_is_new = False
            discard(sys.stdout)
            # Windows reports EINVAL where other systems report EPIPE.
            if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
                raise BrokenPipeError from None
            raise OutputError(f"cannot write to stdout: {error.strerror}") from None

    def text_printer(self) -> RowPrinter:
        """A printer of rows on stdout, a terminal."""
        return RowPrinter(
            self.write_text,
            lambda: max(_size(sys.stdout).columns, 8),
            redraws=self.draws_text,
            styles=self.styles_text,
        )

    # --- stderr ---

    def notice(self, line: str) -> None:
        """Write one dim line, unless `quiet`."""
        if not self.quiet:
            self.lines(" ".join(line.split()), dim=True)

    def lines(self, text: str, *, dim: bool = False, wrap: bool = True) -> None:
        """Write lines, on a terminal wrapped between words, even when `quiet`: they answer a command."""
        self.clear_bar()
        separator = "\n" if self._text_is_new and self._meets_text() else ""
        self._text_is_new = False
        text = without_control_characters(text)
        if wrap and sys.stderr.isatty():
            text = self._wrapped(text)
        self.write_error(separator + (self.dim(text) if dim else text) + "\n")

    def error(self, message: str) -> None:
        """Write an error as one line, also when `quiet`."""
        self.lines(f"error: {one_line(message)}")

    def blank_line(self) -> None:
        """On a terminal, leave a blank line before the next prompt."""
        if sys.stderr.isatty():
            self.write_error("\n")

    def dim(self, text: str) -> str:
        """`text`, dim if stderr is a terminal that supports it; for any terminal, without control characters."""
        if sys.stderr.isatty():
            text = without_control_characters(text)
        return f"{DIM}{text}{NOT_DIM}" if self._dims and text else text

    def write_error(self, text: str) -> None:
        """Write `text`, escape sequences included, to stderr."""
        sys.stderr.write(text)
        sys.stderr.flush()

    def error_printer(self) -> RowPrinter:
        """A printer of rows on stderr, a terminal."""
        return RowPrinter(self.write_error, lambda: self.columns, redraws=self.redraws, styles=self._dims)

    def _wrapped(self, text: str) -> str:
        """Lines wrapped between words; a path or URL that is too long stays in one piece."""
        lines = []
        for line in text.split("\n"):
            wrap = WordWrap(self.columns - 1)
            words = line.lstrip(" ")
            indentation = [(line[: len(line) - len(words)], PLAIN)]
            letters = wrap.begin(indentation, indentation) + wrap.add(words) + wrap.end()
            lines.append("".join(letter for letter, _ in letters))
        return "\n".join(lines)

    def _meets_text(self) -> bool:
        """Whether a line on stderr may continue a row of text.

        It may if both streams are the same terminal, file or pipe, and the text's last row is open; or if another
        program may show the text on this terminal with a delay.
        """
        if sys.stdout.isatty():
            return self._line_open and sys.stderr.isatty()
        try:
            out, err = os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno())
        except (OSError, ValueError):  # not a file, as in tests
            return False
        if sys.stderr.isatty():
            if stat.S_ISFIFO(out.st_mode):
                wait_for_reader(sys.stdout.fileno())
            return stat.S_ISFIFO(out.st_mode) or stat.S_ISSOCK(out.st_mode)
        return self._line_open and bool(out.st_ino) and os.path.samestat(out, err)

    # --- progress bars, on stderr ---

    def progress(self, task: str, unit: str = "B") -> Progress:
        """A function (done, total) that shows the progress of a task; it does nothing if bars are not shown."""
        return self._bars.of(task, unit) or (lambda done, total: None)

    def prompt_progress(self, done: int, total: int) -> None:
        """Show progress of a prompt, in tokens. A short one needs no bar."""
        if total > 256:
            self.progress("reading the prompt", " tokens")(done, total)

    def compilation_progress(self, done: int, total: int) -> None:
        """Show progress of the compilation, in kernels; without a terminal, one line that explains the delay."""
        self.progress("compiling kernels (once)", "")(done, total)
        if not self.shows_bars and not self._told_of_compiling:
            from npqwen.kernels.compiled import is_writable  # loaded by now, by what compiles

            self._told_of_compiling = True
            kept = " (once on this machine for each kind of model and cache)" if is_writable() else ""
            self.notice(f"compiling kernels{kept}")

    def clear_bar(self) -> None:
        """Remove the progress bar, if there is one."""
        self._bars.close()

    # --- the keyboard ---

    @contextlib.contextmanager
    def echo_off(self) -> Iterator[None]:
        """Do not echo keys that are typed in this context; they stay in the input for the next prompt.

        A shell that stops the process, for Ctrl-Z, switches the echo on. When the process continues, it is off again.
        """
        if sys.platform == "win32" or not sys.stdin.isatty() or not _in_foreground(sys.stdin.fileno()):
            yield
            return
        import termios

        stdin = sys.stdin.fileno()
        before = termios.tcgetattr(stdin)
        silent = termios.tcgetattr(stdin)
        silent[3] &= ~termios.ECHO

        def silence(*arguments: object) -> None:
            if _in_foreground(stdin):
                termios.tcsetattr(stdin, termios.TCSADRAIN, silent)

        handles = threading.current_thread() is threading.main_thread()
        continued = signal.signal(signal.SIGCONT, silence) if handles else None
        try:
            silence()
            yield
        finally:
            if handles:
                signal.signal(signal.SIGCONT, continued)
            if _in_foreground(stdin):
                termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def without_control_characters(text: str) -> str:
    """`text` without C0 and C1 control characters, except newline and tab, and without bidirectional overrides.

    Everything that makes a terminal act - cursor movement, colours, titles, the clipboard - begins with a control
    character, such as ESC. Overrides (U+202D, U+202E) display text in a different order.
    """
    return text.translate(_CONTROL_CHARACTERS)


def one_line(message: str) -> str:
    """An error message that may quote foreign text as a line of at most `ERROR_LENGTH` printable characters.

    The middle of a longer one is left out: the problem comes first, the remedy last.
    """
    line = " ".join(without_control_characters(message).split())
    if len(line) <= ERROR_LENGTH:
        return line
    return f"{line[: ERROR_LENGTH - 305]} ... {line[-300:]}"


def wait_for_reader(pipe: int, seconds: float = 0.1) -> None:
    """Wait until what was written to `pipe` has been read, at most `seconds`, and 20 ms more.

    A program that shows it on this terminal, such as tee, can then do so before anything else is written there.
    """
    if sys.platform == "win32":
        return
    import fcntl
    import termios

    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while any(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.02)


def discard(stream: Any) -> None:
    """Redirect a stream whose writes fail to the null device: flushing its buffer at exit would fail again."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # not a file, as in tests
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _in_foreground(terminal: int) -> bool:
    """Whether this process is in the terminal's foreground: in the background, changing its settings would stop us."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False


def _size(first: TextIO) -> os.terminal_size:
    """The size of the terminal behind `first`, else behind another standard stream; any of them may be a file."""
    for stream in (first, sys.stderr, sys.stdout):
        with contextlib.suppress(OSError, ValueError):  # not a terminal, or not a file
            size = os.get_terminal_size(stream.fileno())
            if size.columns and size.lines:
                return size
    import shutil

    size = shutil.get_terminal_size()
    return os.terminal_size((size.columns or 80, size.lines or 24))  # Python 3.10 may return zeros


def _understands_ansi(stream: TextIO) -> bool:
    """Whether the stream is a terminal that understands ANSI escape sequences; on Windows, this enables them."""
    if not stream.isatty():
        return False
    if sys.platform != "win32":
        return os.environ.get("TERM", "dumb") != "dumb"
    import ctypes
    import msvcrt

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    mode = ctypes.c_uint32()
    try:
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno()))
    except OSError:
        return False
    if not kernel.GetConsoleMode(handle, ctypes.byref(mode)):
        return False
    return bool(kernel.SetConsoleMode(handle, mode.value | _ENABLE_VIRTUAL_TERMINAL_PROCESSING))
