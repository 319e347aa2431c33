"""Markdown rendered on a terminal while it is generated."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from npqwen.terminal.inline_markdown import spans
from npqwen.terminal.markdown_table import MarkdownTable, is_delimiter_row
from npqwen.terminal.row_printer import RowPrinter
from npqwen.terminal.styles import BOLD, DIM, PLAIN, UNDERLINED, Run, combined
from npqwen.terminal.width import width

_LONGEST_START = 1000
"""Characters after which a line of still unknown kind is treated as text."""
_ROWS_OF_LAYOUT = 50
"""Lines of a table that determine its column widths; further rows are printed as they arrive."""
_MAX_QUOTES, _MAX_ITEMS = 8, 8
"""Most quote and list markers at the beginning of a line."""
_RULE_WIDTH = 40
_QUOTE_BAR: Run = ("│ ", DIM)

_QUOTE = re.compile(r" {0,3}> ?")
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])([ \t]+)")
_RULE = re.compile(r"[ \t]*([-*_])[ \t]*(?:\1[ \t]*){2,}")
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+")
_FENCE = re.compile(r"[ \t]*(?:(`{3,})[^`]*|(~{3,}).*)")
_MATH = re.compile(r"[ \t]*(\\\[|\$\$|\\begin\{)")
_MATH_ENDS = {"\\[": "\\]", "$$": "$$", "\\begin{": "\\end{"}
_ROW = re.compile(r"[ \t]*\|")
_UNDECIDED = re.compile(
    r"[ \t]*(?:([-*_])(?:[ \t]*\1)*[ \t]*|[+]|#{1,6}[ \t]*|\d{1,9}[.)]?"
    r"|`{1,2}|`{3,}[^`]*|~{1,2}|~{3,}.*|\$|\\[a-z]{0,5}|\|.*)?"
)


class MarkdownText:
    """Prints Markdown with a `RowPrinter`, line by line: only the three kinds of block extend over several lines.

                    +------------------------------------------+
        line ------>| start: held until its kind is certain    |
                    +------------------------------------------+
           | ``` ~~~        | \\[ $$ \\begin{   | | ... |        | # > - 1. --- or text
           v                v                v                v
        +------+         +------+         +-------+        +--------+
        | code |         | math |         | table |        | inline |
        +------+         +------+         +-------+        +--------+
        until a fence    until its end    until another    until the line's end
        or the quote's   or a blank       line, laid out
        end, verbatim    line, as it is   in columns

    Headings, emphasis, links and code are styled; bullets, quotes and rules are drawn; wrapped rows are indented
    to the text of their item. Everything else, such as incomplete markup, is printed as it is written. Without styles
    (NO_COLOR), markers that would become styles stay.
    """

    def __init__(self, rows: RowPrinter) -> None:
        self._rows = rows
        self._state: Literal["start", "verbatim", "plain", "inline"] = "start"
        """How the rest of the line is printed; start: its kind is not known yet."""
        self._line = ""
        """The part of the line that is not printed yet; in the state start, all of it."""
        self._before = ""
        """The character before `_line`, within the line."""
        self._style = PLAIN
        self._fence = ""
        """The characters that opened the code block."""
        self._math_end = ""
        """The marker that ends the math block."""
        self._block_quotes = 0
        """The number of quote markers before the lines of the code or math block."""
        self._math_seen = ""
        """The last characters of the math block's current line."""
        self._table: list[str] = []
        """Lines that are, or may become, a table."""
        self._table_prefix: list[Run] = []
        self._table_layout: MarkdownTable | None = None
        """The table, once its first rows are printed."""

    def add(self, text: str) -> None:
        """Append the next piece, without control characters except newlines and tabs."""
        for number, part in enumerate(text.split("\n")):
            if number:
                self._end_line()
            if part:
                self._line += part
                self._advance(final=False)
        preview = self._preview()
        if self._state == "start" and preview:
            self._rows.begin()
        self._rows.draw(preview)

    def close(self) -> None:
        """Print what was held back: the text ends here."""
        if self._line or self._state != "start":
            self._end_line()
        self._end_table()
        self._rows.close()

    def _advance(self, final: bool) -> None:
        """Print the part of the line that is certain; all of it if `final`."""
        if self._state == "start" and not self._start(final):
            return
        rows = self._rows
        if self._state == "verbatim":
            rows.add_verbatim(self._line)
            self._line = ""
        elif self._state == "plain":
            self._math_seen += self._line
            rows.add([(self._line, PLAIN)])
            self._line = ""
            if self._math_end and self._math_end in self._math_seen:
                self._end_block()
            self._math_seen = self._math_seen[-len(r"\end{") :]
        else:
            runs, end = spans(self._line, self._before, final=final) if rows.styles else ([(self._line, PLAIN)], None)
            rows.add([(text, combined(self._style, style)) for text, style in runs])
            self._before = self._line[:end][-1:] or self._before
            self._line = "" if end is None else self._line[end:]

    def _end_line(self) -> None:
        if self._line.strip() or self._state != "start" or self._fence:
            self._advance(final=True)
            if self._state != "start":  # the rows of a table are ended when they are printed
                self._rows.end()
        else:
            self._end_table()
            self._end_block()
            self._rows.end()
        self._state, self._line, self._before, self._style, self._math_seen = "start", "", "", PLAIN, ""

    def _preview(self) -> list[Run]:
        """The held-back text, as it may be printed later."""
        line = self._line[: 2 * self._rows.columns]  # more than fits a row
        if self._state == "inline" and self._rows.styles:
            runs = spans(line, self._before, final=True, guess=True)[0]
            return [(text, combined(self._style, style)) for text, style in runs]
        if self._table and self._table_layout is None and not line.strip():
            line = self._table[-1]
        return [(line, PLAIN)] if line.strip() else []

    # --- the start of a line ---

    def _start(self, final: bool) -> bool:
        """Recognize the kind of the line, and begin it. Returns whether its text may then be printed."""
        line = self._line
        quotes = 0
        most = self._block_quotes if self._fence or self._math_end else _MAX_QUOTES
        while quotes < most and (quote := _QUOTE.match(line)):
            if quote.end() == len(line) and not final:  # a space may follow
                return False
            line = line[quote.end() :]
            quotes += 1
        prefix = [_QUOTE_BAR] * quotes
        if quotes < self._block_quotes:
            if not final and not line.strip():  # a marker may follow
                return False
            self._end_block()
        undecided = not final and len(line) < _LONGEST_START
        if self._fence:
            return self._start_code(line, prefix, undecided)
        if self._math_end:
            return (bool(line.strip()) or final) and self._begin(line, prefix, prefix, "plain")
        hanging = list(prefix)
        while True:
            if undecided and _UNDECIDED.fullmatch(line):
                return False
            if final and len(line) < _LONGEST_START and len(hanging) == quotes and _ROW.match(line):
                self._add_row(line, prefix)
                return False
            self._end_table()
            item = None if final and _RULE.fullmatch(line) else _ITEM.match(line)
            if item is None or len(hanging) - quotes == _MAX_ITEMS:
                return self._start_text(line, prefix, hanging, final)
            indent, marker, _ = item.groups()
            text = f"{_blank(indent)}{'•' if marker in '-*+' else marker} "
            prefix = [*prefix, (text, PLAIN)]
            hanging = [*hanging, (_blank(text), PLAIN)]
            line = line[item.end() :]

    def _start_text(self, line: str, prefix: list[Run], hanging: list[Run], final: bool) -> bool:
        """Begin a line of text, a heading, a rule, or the first line of a code or math block."""
        heading, fence, math = _HEADING.match(line), _FENCE.fullmatch(line), _MATH.match(line)
        if final and _RULE.fullmatch(line):
            self._begin("", prefix, prefix, "plain")
            self._rows.add([("─" * min(_RULE_WIDTH, self._rows.columns - _width(prefix)), DIM)])
            return True
        if final and fence is not None and len(line) < _LONGEST_START:
            self._fence = fence[1] or fence[2]
            self._block_quotes = prefix.count(_QUOTE_BAR)
            self._begin("", prefix, prefix, "verbatim")
            self._rows.add_verbatim(line, DIM)
            return True
        if math is not None:
            self._math_end = _MATH_ENDS[math[1]]
            self._block_quotes = prefix.count(_QUOTE_BAR)
            self._begin(line, prefix, hanging, "plain")
            opening = self._line[: len(math[1])]  # which may be the closing marker, too
            self._rows.add([(opening, PLAIN)])
            self._line = self._line[len(opening) :]
            return True
        if heading is not None and self._rows.styles:
            self._style = combined(BOLD, UNDERLINED) if len(heading[1]) < 3 else BOLD
            line = line[heading.end() :]
        return self._begin(line, prefix, hanging, "inline")

    def _start_code(self, line: str, prefix: list[Run], undecided: bool) -> bool:
        """Begin a line of a code block, which may be its closing fence."""
        closing = re.compile(rf"[ \t]*{re.escape(self._fence[0])}{{{len(self._fence)},}}[ \t]*").fullmatch(line)
        if undecided and not line.strip(" \t" + self._fence[0]):
            return False
        if closing is None:
            return self._begin(line, prefix, prefix, "verbatim", indent=False)
        self._end_block()
        self._begin("", prefix, prefix, "verbatim")
        self._rows.add_verbatim(line, DIM)
        return True

    def _end_block(self) -> None:
        """End the code or math block, if there is one."""
        self._fence, self._math_end, self._block_quotes = "", "", 0

    def _begin(
        self,
        line: str,
        prefix: list[Run],
        hanging: list[Run],
        state: Literal["verbatim", "plain", "inline"],
        *,
        indent: bool = True,
    ) -> bool:
        """Begin a line on the terminal; `line` is its unprinted rest, whose indentation joins the prefix."""
        text = line.lstrip(" \t") if indent else line
        blank = [(_blank(line[: len(line) - len(text)]), PLAIN)]
        self._rows.begin(prefix + blank, hanging + blank)
        self._line, self._state = text, state
        return True

    # --- tables ---

    def _add_row(self, line: str, prefix: list[Run]) -> None:
        text = line.strip()
        prefix = [*prefix, (_blank(line[: len(line) - len(line.lstrip())]), PLAIN)]
        if self._table and (prefix != self._table_prefix or (len(self._table) == 1 and not is_delimiter_row(text))):
            self._end_table()
        self._line = ""
        if self._table_layout is not None:
            self._print_lines(self._table_layout.lines_of(text))
            return
        self._table.append(text)
        self._table_prefix = prefix
        if len(self._table) == _ROWS_OF_LAYOUT:
            self._print_table()

    def _end_table(self) -> None:
        if self._table and self._table_layout is None:
            self._print_table()
        self._table, self._table_layout = [], None

    def _print_table(self) -> None:
        """Print the table so far, in columns if it is one and fits, else as it is written."""
        if len(self._table) > 1:
            table = MarkdownTable(self._table, styles=self._rows.styles)
            if table.layout(self._rows.columns - _width(self._table_prefix)):
                self._table_layout = table
                self._print_lines(table.lines())
                return
        styles = self._rows.styles
        self._print_lines(spans(line, final=True)[0] if styles else [(line, PLAIN)] for line in self._table)
        self._table = []

    def _print_lines(self, lines: Iterable[list[Run]]) -> None:
        for line in lines:
            self._rows.begin(self._table_prefix, self._table_prefix)
            self._rows.add(line)
            self._rows.end()


def _blank(text: str) -> str:
    """Spaces that take as many columns as `text`."""
    return " " * width(text.expandtabs(4))


def _width(runs: list[Run]) -> int:
    return sum(width(text) for text, _ in runs)
