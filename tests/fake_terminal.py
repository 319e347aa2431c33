"""A terminal that tests can look at, and a conversation in it."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from reciter import Reciter

from npqwen.terminal.answer_view import AnswerView
from npqwen.terminal.settings import Settings
from npqwen.terminal.terminal import Terminal
from npqwen.terminal.terminal_chat import TerminalChat

THOUGHT = "<think>\nHm, {}.\n</think>\n\nIt is {}."
"""A thinking model's output, to be formatted with reasoning and answer."""


class Screen(io.StringIO):
    """A terminal to write to."""

    def isatty(self) -> bool:
        return True

    def rows(self, columns: int = 80) -> list[str]:
        """The text on the screen, by the escape sequences that are used here."""
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|[^\x1b]", self.getvalue()):
            if part == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif part == "\r":
                column = 0
            elif part.endswith("A") and len(part) > 1:
                row -= int(part[2:-1])
                assert row >= 0
            elif part == "\x1b[J":
                rows = [*rows[:row], rows[row][:column]]
            elif len(part) == 1:
                assert len(rows[row]) == column < columns
                rows[row] += part
                column += 1
        return rows


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
    if isinstance(model, Reciter):
        model.bits, model.threads = 4, 1  # type: ignore[attr-defined]
    terminal = Terminal()
    fixed = {name: options.pop(name) for name in ("system", "thinking") if name in options}
    return TerminalChat(model, terminal, AnswerView(terminal, mode), Settings(model, **options), name="m", **fixed)
