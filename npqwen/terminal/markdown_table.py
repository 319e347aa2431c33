"""A table of Markdown, laid out in columns."""

from __future__ import annotations

import re
from collections.abc import Iterator

from npqwen.terminal.inline_markdown import spans
from npqwen.terminal.styles import BOLD, DIM, PLAIN, Cell, Run, combined
from npqwen.terminal.width import width
from npqwen.terminal.word_wrap import WordWrap

_MIN_WIDTH = 5
"""Minimum width of a column whose cells are wrapped."""
_DELIMITERS = re.compile(r"\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*")
_PIPE = re.compile(r"(?<!\\)\|")
_BREAK = re.compile(r"<br\s*/?>")
"""A line break inside a cell: the only HTML in tables that models write."""
_BAR: Run = (" │ ", DIM)


def is_delimiter_row(line: str) -> bool:
    """Whether `line` may be the second line of a table, such as |---|:-:|."""
    return "|" in line and _DELIMITERS.fullmatch(line) is not None


class MarkdownTable:
    """Lines of a table, without indentation: header, delimiter row, rows.

    styles: whether the markup in cells is shown as styles; otherwise it stays.
    """

    def __init__(self, lines: list[str], *, styles: bool) -> None:
        self._styles = styles
        header, delimiters, *rows = [_split(line) for line in lines]
        self._alignments = ["".join((cell[:1], cell[-1:])) for cell in delimiters]
        self._rows = [self._row(header, BOLD), *(self._row(row) for row in rows)]
        self._widths: list[int] = []

    def layout(self, columns: int) -> bool:
        """Choose the widths of the columns, to fit into `columns`. Returns False if there are too many of them."""
        count = max(map(len, self._rows))
        natural = [
            max((_widest(row[n]) for row in self._rows if n < len(row)), default=0) or 1 for n in range(count)
        ]
        room = columns - len(_BAR[0]) * (count - 1)
        widest = max(natural)
        while sum(min(one, widest) for one in natural) > room and widest > _MIN_WIDTH:
            widest -= 1
        self._widths = [min(one, widest) for one in natural]
        return sum(self._widths) <= room

    def lines(self) -> Iterator[list[Run]]:
        """The lines of the table. Rows are separated if any of their cells takes several lines."""
        rows = [self._wrapped(row) for row in self._rows]
        separated = any(len(cell) > 1 for row in rows[1:] for cell in row)
        rule = "─┼─".join("─" * one for one in self._widths)
        for number, row in enumerate(rows):
            if number == 1 or (number and separated):
                yield [(rule, DIM)]
            yield from self._lines_of(row)

    def lines_of(self, line: str) -> Iterator[list[Run]]:
        """The lines of one more row, in the same layout; a row that does not fit becomes one unaligned line."""
        row = self._row(_split(line))
        if len(row) <= len(self._widths) and all(
            _widest(cell) <= columns for cell, columns in zip(row, self._widths, strict=False)
        ):
            yield from self._lines_of(self._wrapped(row))
        else:
            yield [(text.replace("\n", " "), style) for cell in row for text, style in (*cell, _BAR)][:-1]

    def _row(self, texts: list[str], style: str = PLAIN) -> list[list[Run]]:
        if not self._styles:
            return [[(text, PLAIN)] for text in texts]
        return [[(run, combined(style, own)) for run, own in spans(text, final=True)[0]] for text in texts]

    def _wrapped(self, row: list[list[Run]]) -> list[list[list[Cell]]]:
        """The lines of every cell."""
        cells = []
        for number, columns in enumerate(self._widths):
            wrap = WordWrap(columns, hard=True)
            letters: list[Cell] = []
            for text, style in row[number] if number < len(row) else ():
                first, *others = text.split("\n")
                letters += wrap.add(first, style)
                for line in others:
                    letters += [*wrap.end(), ("\n", PLAIN), *wrap.begin(), *wrap.add(line, style)]
            letters += wrap.end()
            lines: list[list[Cell]] = [[]]
            for letter in letters:
                if letter[0] == "\n":
                    lines.append([])
                else:
                    lines[-1].append(letter)
            cells.append(lines)
        return cells

    def _lines_of(self, row: list[list[list[Cell]]]) -> Iterator[list[Run]]:
        for number in range(max(map(len, row))):
            line: list[Run] = []
            for column, cell in enumerate(row):
                letters = cell[number] if number < len(cell) else []
                space = self._widths[column] - _width(letters)
                alignment = self._alignments[column] if column < len(self._alignments) else ""
                left = space // 2 if alignment == "::" else space if alignment == "-:" else 0
                last = column == len(row) - 1
                line += [(" " * left, PLAIN), *letters, ("" if last else " " * (space - left), PLAIN)]
                line += [] if last else [_BAR]
            yield line


def _split(line: str) -> list[str]:
    """The texts of a row's cells."""
    texts = [_BREAK.sub("\n", text.strip().replace("\\|", "|")) for text in _PIPE.split(line)]
    return texts[texts[0] == "" : len(texts) - (len(texts) > 1 and texts[-1] == "")] or [""]


def _widest(cell: list[Run]) -> int:
    """The width of the cell's widest line."""
    return max(map(width, "".join(text for text, _ in cell).split("\n")))


def _width(cell: list[Run]) -> int:
    return sum(width(text) for text, _ in cell)
