"""Styled text that is printed while it grows, wrapped at the terminal's width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from npqwen.terminal.styles import PLAIN, Cell, Run, cells, rendered
from npqwen.terminal.width import has_certain_width, letter_width, width
from npqwen.terminal.word_wrap import WordWrap

_TAB = "    "


class RowPrinter:
    """Prints lines on a terminal, wrapped between words, to the terminal's current width.

    What is printed stays, except the end of the last row: a word that may not fit, and text whose style is not known
    yet, are shown as they arrive and may be replaced by `draw`. Newlines are printed when text follows; `close` prints
    the last one.

    write: writes to the terminal. columns: returns the terminal's width. redraws: whether the terminal can replace
    text; if not, the end of the last row is held back. styles: whether it can show styles.
    """

    def __init__(
        self, write: Callable[[str], None], columns: Callable[[], int], *, redraws: bool, styles: bool
    ) -> None:
        self.styles = styles
        self._write = write
        self._columns = columns
        self._redraws = redraws
        self._wrap = WordWrap(columns() - 1)  # a full last column confuses some terminals
        self._newlines = 0
        """Newlines to be printed before further text."""
        self._begun = False
        self._settled: list[Cell] = []
        """Characters to be printed by `draw`."""
        self._shown: list[Cell] = []
        """What is on the screen after the settled characters."""
        self._shown_width = 0
        """Columns that the last row takes on the screen."""
        self._adopted: list[Cell] = []
        """Shown characters, in reverse order, that stay where they are if the text turns out to contain them."""

    @property
    def columns(self) -> int:
        """The width to which text is wrapped."""
        return self._wrap.columns

    def begin(self, prefix: Sequence[Run] = (), hanging: Sequence[Run] = ()) -> None:
        """Begin a line with `prefix`, and the rows into which it is wrapped, except the first, with `hanging`."""
        self._fit()
        self._begun = True
        self._adopted = []
        self._settled += [("\n", PLAIN)] * self._newlines
        self._newlines = 0
        self._settled += self._wrap.begin(prefix, hanging)

    def add(self, runs: Sequence[Run]) -> None:
        """Append text without newlines to the line."""
        self._fit()
        for text, style in self._shown_as(runs):
            adopted = self._adopt(text, style)
            self._settled += self._wrap.add(text[adopted:], style)

    def add_verbatim(self, text: str, style: str = PLAIN) -> None:
        """Append text that is not wrapped here: the terminal wraps it, so that copied text has no line breaks."""
        self._settled += self._wrap.settle() + cells([(text, style if self.styles else PLAIN)])
        self._wrap.column += width(text)

    def end(self) -> None:
        """End the line. Without `begin` before it, it is empty; empty lines at the beginning are left out."""
        self._settled += self._wrap.end()
        self._newlines += self._begun

    def draw(self, preview: Sequence[Run] = ()) -> None:
        """Print what has been appended and, until the next `draw`, `preview`, as far as the row has room for it."""
        columns = self._columns()
        following = [*self._wrap.unsettled, *cells(self._shown_as(preview))]
        settled, self._settled = self._settled, []
        shown, row = self._fitting(following, columns)
        new = settled + shown
        same = 0
        while same < min(len(new), len(self._shown)) and new[same] == self._shown[same]:
            same += 1
        replaced = sum(letter_width(letter) for letter, _ in self._shown[same:])
        output = rendered(new[same:])
        if replaced and self._shown_width < columns:
            output = f"\x1b[{replaced}D\x1b[K{output}"
        elif replaced and output and not output.startswith("\n"):
            output = f"\n{output}"  # the narrower window has broken the row: leave it as it is
        self._shown, self._shown_width = shown, row
        if output:
            self._write(output)

    def _fitting(self, following: list[Cell], columns: int) -> tuple[list[Cell], int]:
        """The part of `following`, the unsettled characters, that may be shown; and the row's width with it."""
        shown: list[Cell] = []
        row = self._wrap.column
        if not self._redraws or self._newlines:
            return shown, row
        if self._adopted:
            adopted = self._adopted[::-1]
            return (adopted if following[: len(adopted)] == adopted else []), row
        for letter, style in following:
            row += letter_width(letter)
            if row >= columns or not has_certain_width(letter):
                return shown, row - letter_width(letter)
            shown.append((letter, style))
        return shown, row

    def close(self) -> None:
        """Print what is left, and one newline if anything was printed."""
        self._settled += self._wrap.end()
        self._newlines = 0
        self.draw()
        if self._begun:
            self._write("\n")
        self._begun = False

    def _shown_as(self, runs: Sequence[Run]) -> list[Run]:
        return [(text.replace("\t", _TAB), style if self.styles else PLAIN) for text, style in runs]

    def _fit(self) -> None:
        """Adapt to a change of the terminal's width."""
        columns = self._columns() - 1
        if columns == self._wrap.columns:
            return
        self._wrap.columns = columns
        if self._shown_width > columns:  # the terminal has broken the row, or cut it off
            unsettled = self._wrap.unsettled
            self._settled += self._wrap.overflow(in_word=bool(unsettled) and unsettled[-1][0] != " ")
            self._adopted = self._shown[len(unsettled) :][::-1]

    def _adopt(self, text: str, style: str) -> int:
        """Settle the beginning of the text that is already on the screen; returns its number of characters."""
        count = 0
        while self._adopted and count < len(text) and self._adopted[-1] == (text[count], style):
            self._settled.append(self._adopted.pop())
            count += 1
        if self._adopted and count < len(text):
            self._adopted = []
            self._wrap.overflow(in_word=False)
        elif count:
            self._wrap.overflow(in_word=text[count - 1] != " ")
        return count
