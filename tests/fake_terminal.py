"""A terminal that tests can look at, and a conversation in it."""

from __future__ import annotations

import io
import sys
from typing import Any

import pyte
import pytest

from npqwen.terminal.answer_view import AnswerView
from npqwen.terminal.settings import Settings
from npqwen.terminal.terminal import Terminal
from npqwen.terminal.terminal_chat import TerminalChat

THOUGHT = "<think>\nHm, {}.\n</think>\n\nIt is {}."
"""A thinking model's output, to be formatted with reasoning and answer."""


class Screen(io.StringIO):
    """A terminal to write to, emulated by pyte."""

    def isatty(self) -> bool:
        return True

    def rows(self, columns: int = 80) -> list[str]:
        """The rows on the screen, down to the cursor's, without spaces at their ends."""
        screen = emulated(self.getvalue(), columns)
        return [row.rstrip() for row in screen.display[: screen.cursor.y + 1]]


def emulated(written: str, columns: int, lines: int = 200) -> pyte.Screen:
    """A terminal after `written`, which has ended lines with "\\n" alone, as programs do."""
    screen = pyte.Screen(columns, lines)
    screen.set_mode(pyte.modes.LNM)
    stream = pyte.Stream(screen)
    for letter in written:  # of several at once, pyte drops those after a zero-width joiner
        stream.feed(letter)
    return screen


def on_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Stdout and stderr become one terminal. To be called in the test: pytest sets its own before that."""
    both = Screen()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return both


def chat_with(model: Any, mode: Any = "fold", **options: Any) -> TerminalChat:
    """A conversation with a model, shown on the present stdout and stderr."""
    terminal = Terminal()
    fixed = {name: options.pop(name) for name in ("system", "thinking") if name in options}
    return TerminalChat(model, terminal, AnswerView(terminal, mode), Settings(model, **options), name="m", **fixed)
