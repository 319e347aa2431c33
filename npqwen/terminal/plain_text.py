"""Plain text, wrapped for a terminal while it is generated."""

from __future__ import annotations

from npqwen.terminal.row_printer import RowPrinter
from npqwen.terminal.styles import PLAIN


class PlainText:
    """Prints text with a `RowPrinter`, in one style. Wrapped rows are indented like their line."""

    def __init__(self, rows: RowPrinter, style: str = PLAIN) -> None:
        self._rows = rows
        self._style = style
        self._indentation = ""
        self._begun = False
        """Whether the line has more than indentation so far."""

    def add(self, text: str) -> None:
        """Append the next piece, without control characters except newlines and tabs."""
        for number, part in enumerate(text.split("\n")):
            if number:
                self._rows.end()
                self._indentation, self._begun = "", False
            if not self._begun:
                rest = part.lstrip(" \t")
                self._indentation += part[: len(part) - len(rest)]
                part = rest
                if not rest:
                    continue
                blank = [(self._indentation.expandtabs(), PLAIN)]
                self._rows.begin(blank, blank)
                self._begun = True
            self._rows.add([(part, self._style)])
        self._rows.draw()

    def close(self) -> None:
        """Print what was held back: the text ends here."""
        self._rows.close()
