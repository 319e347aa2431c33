"""The terminal: text to stdout as it comes, what is going on to stderr."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

from npqwen.errors import OutputError
from npqwen.terminal.control_characters import without_control_characters


class Console:
    """Where a command writes.

    Text goes to stdout, in UTF-8 whatever the locale, and is flushed at once; to a terminal without control
    characters, which it would obey. Notices, progress bars (on a terminal only) and statistics go to stderr, unless
    `quiet`. As a context manager it leaves no progress bar behind.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bars = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._doing = ""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # as paths are decoded

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.end_bar()

    def text(self, text: str) -> None:
        """Write a piece of text to stdout. Raises BrokenPipeError if the reader is gone, else OutputError."""
        try:
            sys.stdout.write(without_control_characters(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        except OSError as error:
            discard_output()
            # Windows says EINVAL where others say EPIPE.
            if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
                raise BrokenPipeError from None
            raise OutputError(f"the text cannot be written to stdout: {error.strerror}") from None

    def end_line(self) -> None:
        """End the text's last line on a terminal; in a file or pipe the text stays as it is."""
        if sys.stdout.isatty():
            self.text("\n")

    def notice(self, line: str) -> None:
        """Write a line to stderr."""
        if not self.quiet:
            self.end_bar()
            print(line, file=sys.stderr, flush=True)

    def converting(self, done: int, total: int) -> None:
        """Progress in bytes."""
        self._progress("converting", "B", done, total)

    def reading(self, done: int, total: int) -> None:
        """Progress of a prompt in tokens; a short one is read before a bar could be."""
        if total > 256:
            self._progress("reading the prompt", " tokens", done, total)

    def measuring(self, done: int, total: int) -> None:
        """Progress in runs of a benchmark."""
        self._progress("measuring", " runs", done, total)

    def compiling(self, done: int, total: int) -> None:
        """Progress in kernels; without a terminal, one line that tells why nothing happens for a while."""
        if self.bars:
            self._progress("compiling kernels (once for this machine)", "", done, total)
        elif self._doing != "compiling":
            self._doing = "compiling"
            self.notice(f"compiling {total} kernels (once for this machine)")

    def _progress(self, doing: str, unit: str, done: int, total: int) -> None:
        if not self.bars:
            return
        if self._bar is None or self._doing != doing:
            from tqdm import tqdm

            self.end_bar()
            self._doing = doing
            self._bar = tqdm(desc=doing, total=total, unit=unit, unit_scale=unit == "B", leave=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.end_bar()

    def end_bar(self) -> None:
        """Take away a progress bar that is not at its end."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def discard_output() -> None:
    """Send what is still buffered for stdout nowhere: it failed once, and would fail again at exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file, as in tests
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
