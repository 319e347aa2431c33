"""A thought on the terminal: its last rows while it comes, one line when it is over."""

from __future__ import annotations

import time
import unicodedata
from typing import Literal

from npqwen.terminal.control_characters import without_control_characters
from npqwen.terminal.screen import Terminal

View = Literal["fold", "show", "hide"]
ROWS = 6
"""Rows of a thought that are seen at a time."""
_MARGIN = "  "
_WIDEST = 100


class ThoughtView:
    """Shows one thought on stderr.

    view: "fold" shows the last rows as they come and replaces them by one line at the end, "show" leaves the whole
    thought, "hide" shows none of it. Without a terminal nothing is written, except the thought itself to "show" it.
    """

    def __init__(self, terminal: Terminal, view: View) -> None:
        self._terminal = terminal
        self._view = view
        self._start = time.monotonic()
        self._rows: list[str] = []
        self._drawn: list[str] = []
        self._any = False
        self.open = False

    def add(self, text: str) -> None:
        """A piece of the thought."""
        terminal = self._terminal
        if not self.open:
            self.open = True
            self._start = time.monotonic()
            if self._view != "show" and terminal.live:
                terminal.error_text(terminal.dim("thinking..."))
        if self._view == "show":
            self._any = True
            terminal.error_text(terminal.dim(text))
        elif self._view == "fold" and terminal.live:
            self._wrap(without_control_characters(text).replace("\t", " "))
            self._draw()

    def close(self, tokens: int, how: str = "") -> None:
        """The thought is over, after so many tokens. how: what to add to the line that tells it."""
        if not self.open:
            return
        self.open = False
        terminal = self._terminal
        if self._any:
            terminal.error_text("\n")
        elif terminal.live:
            terminal.error_text(self._back() + "\r\x1b[J")
        self._drawn = []
        if terminal.live or self._view == "show":
            seconds = time.monotonic() - self._start
            terminal.notice(f"thought for {seconds:.1f} s, {tokens} tokens{how}")

    def _wrap(self, text: str) -> None:
        """Add to the rows, broken between words where there are any; empty rows are left out."""
        room = min(self._terminal.columns - 1, _WIDEST) - len(_MARGIN)
        rows = self._rows or [""]
        for letter in text:
            if letter == "\n":
                if rows[-1]:
                    rows.append("")
                continue
            if width(rows[-1]) + width(letter) > room:
                begun, space, word = rows[-1].rpartition(" ")
                if letter == " ":
                    rows.append("")
                    continue
                if space and begun.strip() and width(word) + width(letter) <= room:
                    rows[-1] = begun
                    rows.append(word)
                else:
                    rows.append("")
            rows[-1] += letter
        self._rows = rows[-ROWS:]

    def _draw(self) -> None:
        most = min(ROWS, self._terminal.rows - 2)
        rows = [_MARGIN + row for row in self._rows if row][-most:]
        if rows == self._drawn:
            return
        same = len(rows) == len(self._drawn) and rows[:-1] == self._drawn[:-1]
        if same and rows[-1].startswith(self._drawn[-1]):
            written = self._terminal.dim(rows[-1][len(self._drawn[-1]) :])
        else:
            dim = self._terminal.dim
            written = self._back() + "\r\x1b[J" + "\n".join([dim("thinking..."), *map(dim, rows)])
        self._drawn = rows
        self._terminal.error_text(written)

    def _back(self) -> str:
        """To the first row of what is drawn. A terminal that became narrower has broken long rows in two."""
        columns = self._terminal.columns
        rows = sum(max(1, -(-width(row) // columns)) for row in self._drawn)
        return f"\x1b[{rows}A" if rows else ""


def width(text: str) -> int:
    """Columns that a text takes, never fewer than on a terminal that knows all of Unicode."""
    if text.isascii():
        return len(text)
    return sum(_letter_width(letter) for letter in text)


def _letter_width(letter: str) -> int:
    if letter == "\ufe0f":  # makes a narrow sign an emoji, which is wide
        return 1
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
