"""The model's reasoning on a terminal: its last rows while it thinks, folded into one line afterwards."""

from __future__ import annotations

import sys
import time
from typing import Literal

from npqwen.terminal.plain_text import PlainText
from npqwen.terminal.styles import DIM
from npqwen.terminal.terminal import Terminal, without_control_characters
from npqwen.terminal.width import width
from npqwen.terminal.word_wrap import WordWrap

ReasoningMode = Literal["fold", "show", "hide"]
ROWS = 6
"""Rows of reasoning that are visible at a time."""
_HEADING = "thinking..."
_ENDING = "ending the thinking..."
_MARGIN = "  "
_MAX_COLUMNS = 100


class ReasoningView:
    """Shows the reasoning of one answer on stderr.

    mode: "fold" shows the last rows while the model thinks and replaces them with one line at the end, "show" leaves
    all of the reasoning on the screen, wrapped, "hide" shows none. If stderr is not a terminal, only mode "show" writes
    anything: the unwrapped text, and the line at the end.

    hint: what the user can do meanwhile, shown in the line above the reasoning if the window is wide enough.
    """

    def __init__(self, terminal: Terminal, mode: ReasoningMode, hint: str = "") -> None:
        self._terminal = terminal
        self._mode = mode
        self._hint = hint
        self._ending = False
        self._start = time.monotonic()
        self._whole = PlainText(terminal.error_printer(), DIM)
        """All of the reasoning, in mode "show" on a terminal."""
        self._wrap = WordWrap(0, hard=True)
        self._rows = [""]
        """The last rows, wrapped; the last one, without its last word, is still growing."""
        self._drawn: list[str] = []
        """The rows on the screen, the heading first."""
        self.open = False
        """Whether reasoning has begun and not ended."""

    def add(self, text: str) -> None:
        """Show the next piece of reasoning."""
        terminal = self._terminal
        if not self.open:
            self.open = True
            self._start = time.monotonic()
            heading = self._heading()
            if terminal.redraws and (self._mode != "show" or heading != _HEADING):
                terminal.write_error(terminal.dim(heading) + ("\n" if self._mode == "show" else ""))
                self._drawn = [heading]
        if self._mode == "show":
            if sys.stderr.isatty():
                self._whole.add(without_control_characters(text))
            else:
                terminal.write_error(text)
        elif self._mode == "fold" and terminal.redraws:
            self._add_rows(without_control_characters(text).replace("\t", " "))
            self._draw()

    def announce_end(self) -> None:
        """Say that the thinking is being ended, which takes a moment."""
        self._ending = True
        if self.open and self._mode != "show" and self._terminal.redraws:
            self._redraw(self._drawn[1:])

    def close(self, tokens: int, remark: str = "", *, interrupted: bool = False) -> None:
        """End the reasoning, of `tokens` tokens, and replace folded rows with a line that ends with `remark`."""
        if not self.open:
            return
        self.open = False
        terminal = self._terminal
        if self._mode == "show":
            if sys.stderr.isatty():
                self._whole.close()
            else:
                terminal.write_error("\n")
        elif terminal.redraws:
            terminal.write_error(self._cursor_to_top() + "\r\x1b[J")
        self._drawn = []
        if terminal.redraws or self._mode == "show":
            seconds = time.monotonic() - self._start
            verb = "thinking interrupted after" if interrupted else "thought for"
            terminal.notice(f"{verb} {seconds:.1f} s, {tokens} tokens{remark}")

    def _add_rows(self, text: str) -> None:
        """Append `text` to the rows, wrapped between words where possible."""
        self._wrap.columns = min(self._terminal.columns - 1, _MAX_COLUMNS) - len(_MARGIN)
        rows = self._rows
        for number, line in enumerate(text.split("\n")):
            if number:
                rows[-1] += "".join(letter for letter, _ in self._wrap.end())
                rows.append("")
                self._wrap.begin()
            for letter, _ in self._wrap.add(line):
                if letter == "\n":
                    rows.append("")
                else:
                    rows[-1] += letter
        self._rows = [*filter(None, rows[:-1]), rows[-1]][-ROWS:]

    def _draw(self) -> None:
        limit = min(ROWS, self._terminal.rows - 2)
        heading, *drawn = self._drawn
        last = self._rows[-1] + "".join(letter for letter, _ in self._wrap.unsettled)
        rows = [_MARGIN + row for row in (*self._rows[:-1], last) if row][-limit:]
        if rows == drawn:
            return
        if drawn and len(rows) == len(drawn) and rows[:-1] == drawn[:-1] and rows[-1].startswith(drawn[-1]):
            self._terminal.write_error(self._terminal.dim(rows[-1][len(drawn[-1]) :]))  # only the last row has grown
            self._drawn = [heading, *rows]
        else:
            self._redraw(rows)

    def _redraw(self, rows: list[str]) -> None:
        """Draw the heading and `rows` in place of what is on the screen."""
        drawn = [self._heading(), *rows]
        self._terminal.write_error(f"{self._cursor_to_top()}\r\x1b[J" + "\n".join(map(self._terminal.dim, drawn)))
        self._drawn = drawn

    def _heading(self) -> str:
        """The line above the reasoning, with the hint if the window is wide enough."""
        if self._ending:
            return _ENDING
        heading = f"{_HEADING} ({self._hint})"
        return heading if self._hint and len(heading) < self._terminal.columns else _HEADING

    def _cursor_to_top(self) -> str:
        """The escape sequence that moves to the heading. A terminal that has become narrower has wrapped long rows."""
        columns = self._terminal.columns
        rows = sum(max(1, -(-width(row) // columns)) for row in self._drawn) - 1
        return f"\x1b[{rows}A" if rows > 0 else ""

