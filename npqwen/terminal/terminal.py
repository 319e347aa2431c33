"""Output of the commands: the model's text to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from npqwen.errors import OutputError

DIM, NOT_DIM = "\x1b[2m", "\x1b[22m"
ERROR_LENGTH = 1000
"""Longest line of an error message, in characters."""
_CONTROL_CHARACTERS = {
    code: None for code in (*range(0x20), *range(0x7F, 0xA0), 0x202D, 0x202E) if chr(code) not in "\n\t"
}
_ENABLE_VIRTUAL_TERMINAL_PROCESSING = 0x0004


class Terminal:
    """Writes a model's text to stdout, and notices, progress bars, statistics and reasoning to stderr.

    Text is UTF-8 whatever the locale, and flushed at once. Text for a terminal contains no control characters but
    newline and tab, except the escape sequences that this package writes itself; text for a file or pipe is not
    changed. Lines are dim (unless NO_COLOR is set), wrapped and overwritten only on a terminal.

    quiet: leave out notices, progress bars, and everything that is overwritten later. On exit from the context, an
    unfinished progress bar is removed.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        ansi = sys.stderr.isatty() and _understands_ansi()
        self.quiet = quiet
        self.redraws = ansi and not quiet
        """Whether text on stderr may be written over later."""
        self._dims = ansi and not os.environ.get("NO_COLOR")
        self._at_line_start = True
        self._bar: Any = None
        self._task = ""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # the error handler of paths

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.clear_bar()
        if kind is not None and issubclass(kind, Exception):  # the error's message begins a line
            self.end_line()

    @property
    def shows_bars(self) -> bool:
        """Whether progress bars are shown."""
        return not self.quiet and sys.stderr.isatty()

    @property
    def columns(self) -> int:
        """The current width of the terminal."""
        return max(_size().columns, 8)

    @property
    def rows(self) -> int:
        """The current height of the terminal."""
        return max(_size().lines, 4)

    # --- stdout ---

    def text(self, text: str) -> None:
        """Write text of the model to stdout. Raises BrokenPipeError if the reader has gone, else OutputError."""
        if not text:
            return
        self._at_line_start = text.endswith("\n")
        try:
            sys.stdout.write(without_control_characters(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        except OSError as error:
            self._at_line_start = True
            discard(sys.stdout)
            # Windows reports EINVAL where other systems report EPIPE.
            if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
                raise BrokenPipeError from None
            raise OutputError(f"cannot write to stdout: {error.strerror}") from None

    def end_line(self) -> None:
        """On a terminal, end the line of text that is still open; in a file or pipe the text stays unchanged."""
        if not self._at_line_start:
            self._at_line_start = True
            if sys.stdout.isatty():
                self.text("\n")

    # --- stderr ---

    def notice(self, line: str) -> None:
        """Write one dim line, unless `quiet`."""
        if not self.quiet:
            self.lines(" ".join(line.split()), dim=True)

    def lines(self, text: str, *, dim: bool = False) -> None:
        """Write lines, also when `quiet`: the user has asked for them."""
        self.end_line()
        self.clear_bar()
        text = self._wrapped(without_control_characters(text))
        self.write_error((self.dim(text) if dim else text) + "\n")

    def error(self, message: str) -> None:
        """Write an error as one line, also when `quiet`."""
        self.lines(f"error: {one_line(message)}")

    def blank_line(self) -> None:
        """On a terminal, leave a blank line before the next prompt."""
        if sys.stderr.isatty():
            self.write_error("\n")

    def dim(self, text: str) -> str:
        """`text` between the sequences for dim letters, if the terminal has them; no control characters for one."""
        if sys.stderr.isatty():
            text = without_control_characters(text)
        return f"{DIM}{text}{NOT_DIM}" if self._dims and text else text

    def write_error(self, text: str) -> None:
        """Write `text`, escape sequences included, to stderr."""
        sys.stderr.write(text)
        sys.stderr.flush()

    def _wrapped(self, text: str) -> str:
        """On a terminal, lines wrapped between words; a path or URL that is too long stays in one piece."""
        if not sys.stderr.isatty():
            return text
        columns = self.columns
        lines: list[str] = []
        for line in text.split("\n"):
            indent = line[: len(line) - len(line.lstrip())][: columns // 2]
            if len(line) < columns:
                lines.append(line)
            else:
                lines += textwrap.wrap(
                    line, columns - 1, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
                )
        return "\n".join(lines)

    # --- progress bars, on stderr ---

    def conversion_progress(self, done: int, total: int) -> None:
        """Show progress of a conversion, in bytes."""
        self._progress("converting", "B", done, total)

    def calibration_progress(self, done: int, total: int) -> None:
        """Show progress of a calibration, in bytes of matrices."""
        self._progress("calibrating", "B", done, total)

    def writing_progress(self, done: int, total: int) -> None:
        """Show progress of a text that is written to be calibrated with, in tokens."""
        self._progress("writing", " tokens", done, total)

    def prompt_progress(self, done: int, total: int) -> None:
        """Show progress of a prompt, in tokens. A short one needs no bar."""
        if total > 256:
            self._progress("reading the prompt", " tokens", done, total)

    def benchmark_progress(self, done: int, total: int) -> None:
        """Show progress of a benchmark, in runs."""
        self._progress("measuring", " runs", done, total)

    def evaluation_progress(self, done: int, total: int) -> None:
        """Show progress of an evaluation, in tokens run."""
        self._progress("evaluating", " tokens", done, total)

    def compilation_progress(self, done: int, total: int) -> None:
        """Show progress of the compilation, in kernels; without a terminal, one line that explains the delay."""
        if self.shows_bars:
            self._progress("compiling kernels (once for this machine)", "", done, total)
        elif self._task != "compiling":
            self._task = "compiling"
            self.notice(f"compiling {total} kernels (once for this machine)")

    def _progress(self, task: str, unit: str, done: int, total: int) -> None:
        if not self.shows_bars:
            return
        if self._bar is None or self._task != task:
            from tqdm import tqdm

            self.clear_bar()
            self._task = task
            self._bar = tqdm(desc=task, total=total, unit=unit, unit_scale=unit == "B", leave=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.clear_bar()

    def clear_bar(self) -> None:
        """Remove the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # --- the keyboard ---

    @contextlib.contextmanager
    def echo_off(self) -> Iterator[None]:
        """Do not echo keys that are typed meanwhile; they stay in the input for the next prompt."""
        if sys.platform == "win32" or not sys.stdin.isatty() or not _in_foreground(sys.stdin.fileno()):
            yield
            return
        import termios

        stdin = sys.stdin.fileno()
        before = termios.tcgetattr(stdin)
        silent = termios.tcgetattr(stdin)
        silent[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(stdin, termios.TCSADRAIN, silent)
            yield
        finally:
            if _in_foreground(stdin):
                termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def without_control_characters(text: str) -> str:
    """`text` without C0 and C1 control characters, except newline and tab, and without bidirectional overrides.

    Everything that makes a terminal act - cursor movement, colours, titles, the clipboard - begins with a control
    character, such as ESC. Overrides (U+202D, U+202E) show text in another order than it has.
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


def discard(stream: Any) -> None:
    """Redirect a stream that cannot be written to the null device: its buffer would fail again at exit."""
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


def _size() -> os.terminal_size:
    """The size of stderr's terminal; stdout may be a file."""
    with contextlib.suppress(OSError, ValueError):  # not a terminal, or not a file
        size = os.get_terminal_size(sys.stderr.fileno())
        if size.columns and size.lines:
            return size
    import shutil

    size = shutil.get_terminal_size()
    return os.terminal_size((size.columns or 80, size.lines or 24))  # Python 3.10 lets zeros pass


def _understands_ansi() -> bool:
    """Whether stderr's terminal understands ANSI escape sequences; on Windows, this enables them."""
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
    return bool(kernel.SetConsoleMode(handle, mode.value | _ENABLE_VIRTUAL_TERMINAL_PROCESSING))
