"""The model's reasoning on a terminal: its last rows while it thinks, folded into one line afterwards."""

from __future__ import annotations

import time
import unicodedata
from typing import Literal

from npqwen.terminal.terminal import Terminal, without_control_characters

ReasoningMode = Literal["fold", "show", "hide"]
ROWS = 6
"""Rows of reasoning that are visible at a time."""
_HEADING = "thinking..."
_MARGIN = "  "
_MAX_COLUMNS = 100


class ReasoningView:
    """Shows the reasoning of one answer on stderr.

    mode: "fold" shows the last rows while the model thinks and replaces them with one line at the end, "show" leaves
    all of the reasoning on the screen, "hide" shows none. Unless stderr is a terminal, nothing but the text itself is
    written, in mode "show".

    hint: what the user can do meanwhile, shown in the line above the reasoning if the window is wide enough.
    """

    def __init__(self, terminal: Terminal, mode: ReasoningMode, hint: str = "") -> None:
        self._terminal = terminal
        self._mode = mode
        self._hint = hint
        self._heading = _HEADING
        self._start = time.monotonic()
        self._rows: list[str] = []
        """The last rows, wrapped; the last one is still growing."""
        self._drawn: list[str] = []
        """The rows on the screen, below the heading."""
        self.open = False
        """Whether reasoning has begun and not ended."""

    def add(self, text: str) -> None:
        """Show the next piece of reasoning."""
        terminal = self._terminal
        if not self.open:
            self.open = True
            self._start = time.monotonic()
            if self._hint and len(_HEADING) + len(self._hint) + 3 < terminal.columns:
                self._heading = f"{_HEADING} ({self._hint})"
            if terminal.redraws and (self._hint or self._mode != "show"):
                terminal.write_error(terminal.dim(self._heading) + ("\n" if self._mode == "show" else ""))
        if self._mode == "show":
            terminal.write_error(terminal.dim(text))
        elif self._mode == "fold" and terminal.redraws:
            self._wrap(without_control_characters(text).replace("\t", " "))
            self._draw()

    def announce_end(self) -> None:
        """Say that the thinking is being ended, which takes a moment."""
        self._heading = "ending the thinking..."
        if self.open and self._mode != "show" and self._terminal.redraws:
            self._redraw()

    def close(self, tokens: int, remark: str = "", *, interrupted: bool = False) -> None:
        """End the reasoning, of `tokens` tokens, and replace what is folded with a line that ends with `remark`."""
        if not self.open:
            return
        self.open = False
        terminal = self._terminal
        if self._mode == "show":
            terminal.write_error("\n")
        elif terminal.redraws:
            terminal.write_error(self._cursor_to_top() + "\r\x1b[J")
        self._drawn = []
        if terminal.redraws or self._mode == "show":
            seconds = time.monotonic() - self._start
            verb = "thinking interrupted after" if interrupted else "thought for"
            terminal.notice(f"{verb} {seconds:.1f} s, {tokens} tokens{remark}")

    def _wrap(self, text: str) -> None:
        """Append `text` to the rows, wrapped between words where possible; blank rows are left out."""
        columns = min(self._terminal.columns - 1, _MAX_COLUMNS) - len(_MARGIN)
        rows = self._rows or [""]
        for letter in text:
            if letter == "\n":
                if rows[-1]:
                    rows.append("")
                continue
            if width(rows[-1]) + width(letter) > columns:
                head, space, word = rows[-1].rpartition(" ")
                if letter == " ":
                    rows.append("")
                    continue
                if space and head.strip() and width(word) + width(letter) <= columns:
                    rows[-1] = head
                    rows.append(word)
                else:
                    rows.append("")
            rows[-1] += letter
        self._rows = rows[-ROWS:]

    def _draw(self) -> None:
        limit = min(ROWS, self._terminal.rows - 2)
        rows = [_MARGIN + row for row in self._rows if row][-limit:]
        if rows == self._drawn:
            return
        dim = self._terminal.dim
        if len(rows) == len(self._drawn) and rows[:-1] == self._drawn[:-1] and rows[-1].startswith(self._drawn[-1]):
            self._terminal.write_error(dim(rows[-1][len(self._drawn[-1]) :]))  # only the last row has grown
            self._drawn = rows
        else:
            self._redraw(rows)

    def _redraw(self, rows: list[str] | None = None) -> None:
        """Draw the heading and `rows` (default: those on the screen) in place of what is on the screen."""
        rows = self._drawn if rows is None else rows
        dim = self._terminal.dim
        lines = "\n".join([dim(self._heading), *map(dim, rows)])
        self._terminal.write_error(f"{self._cursor_to_top()}\r\x1b[J{lines}")
        self._drawn = rows

    def _cursor_to_top(self) -> str:
        """Move to the heading. A terminal that has become narrower has wrapped long rows."""
        columns = self._terminal.columns
        rows = sum(max(1, -(-width(row) // columns)) for row in self._drawn)
        return f"\x1b[{rows}A" if rows else ""


def width(text: str) -> int:
    """How many columns `text` takes, at least as many as on a terminal that knows all of Unicode."""
    if text.isascii():
        return len(text)
    return sum(_letter_width(letter) for letter in text)


def _letter_width(letter: str) -> int:
    if letter == "\ufe0f":  # turns a narrow sign into an emoji, which is wide
        return 1
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
