"""The text of an answer on stdout: readable on a terminal, exact in a file or pipe."""

from __future__ import annotations

import sys
from typing import Protocol

from npqwen.terminal.markdown_text import MarkdownText
from npqwen.terminal.plain_text import PlainText
from npqwen.terminal.row_printer import RowPrinter
from npqwen.terminal.terminal import Terminal, without_control_characters


class AnswerText(Protocol):
    """One text on stdout."""

    def add(self, text: str) -> None:
        """Write the next piece. Raises BrokenPipeError or OutputError, see `Terminal.write_text`."""

    def pause(self) -> None:
        """Prepare for other output on stderr before the text continues."""

    def close(self, *, complete: bool) -> None:
        """End the text. complete: whether it was not interrupted."""


def answer_text(terminal: Terminal, *, markdown: bool = False, exact: bool = False) -> AnswerText:
    """The text of an answer: on a terminal a `ScreenText`, else a `PipedText`.

    markdown: on a terminal that understands escape sequences, show Markdown rendered. exact: see `PipedText`.
    """
    if sys.stdout.isatty():
        return ScreenText(terminal, markdown=markdown and terminal.draws_text)
    return PipedText(terminal, exact=exact)


def rendered(text: str, columns: int, styles: bool) -> str:
    """A finished Markdown text as rows of at most `columns`, for a terminal that understands escape sequences.

    styles: whether to use text styles.
    """
    rows: list[str] = []
    printer = MarkdownText(RowPrinter(rows.append, lambda: columns, redraws=False, styles=styles))
    printer.add(without_control_characters(text))
    printer.close()
    return "".join(rows)


class ScreenText:
    """A text on a terminal: wrapped between words, without control characters, and ended by a newline.

    markdown: render it as Markdown.
    """

    def __init__(self, terminal: Terminal, *, markdown: bool) -> None:
        self._terminal = terminal
        self._markdown = markdown
        self._part: MarkdownText | PlainText | None = None

    def add(self, text: str) -> None:
        if self._part is None:
            self._part = (MarkdownText if self._markdown else PlainText)(self._terminal.text_printer())
        self._part.add(without_control_characters(text))

    def pause(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None

    def close(self, *, complete: bool) -> None:
        self.pause()


class PipedText:
    """A text in a file or pipe, which ends with one newline, unless it was interrupted before it began.

    exact: keep trailing newlines of the text itself, and always add one, so that readers that strip one get the exact
    text.
    """

    def __init__(self, terminal: Terminal, *, exact: bool) -> None:
        self._terminal = terminal
        self._exact = exact
        self._begun = False
        self._newlines = 0
        """The number of trailing newlines that are held back."""

    def add(self, text: str) -> None:
        body = text if self._exact else text.rstrip("\n")
        newlines = len(text) - len(body)
        if body:
            body = "\n" * self._newlines + body
            self._begun, self._newlines = True, 0  # before writing, which Ctrl-C may interrupt
            self._terminal.write_text(body)
        self._newlines += newlines

    def pause(self) -> None:
        pass

    def close(self, *, complete: bool) -> None:
        if complete or self._begun:
            self._terminal.write_text("\n")
