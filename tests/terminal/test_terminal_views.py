"""The display in the terminal: answers, reasoning, notices, errors."""

from __future__ import annotations

import os
import re

import pytest
from fake_terminal import THOUGHT, chat_with, on_screen
from reciter import Reciter

from npqwen.terminal.answer_text import answer_text
from npqwen.terminal.reasoning_view import ROWS, ReasoningView
from npqwen.terminal.repl import handle
from npqwen.terminal.terminal import Terminal, without_control_characters
from npqwen.terminal.width import width

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")


def test_an_error_is_a_line_and_the_conversation_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_with(Reciter("Yes.", context=64))
    handle(chat, "word " * 100)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("error: this message is too long: it takes ")
    handle(chat, "q")
    assert capsys.readouterr().out == "Yes.\n"


def test_a_thought_is_folded_to_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    chat = chat_with(Reciter(THOUGHT.format("\n".join(f"line {n}" for n in range(40)), 42)))
    handle(chat, "q")
    assert "  line 39." not in screen.rows()
    first, answer, stats = screen.rows()[:3]
    assert re.fullmatch(r"thought for \d+\.\d s, \d+ tokens; /thought shows it", first)
    assert answer == "It is 42."
    assert "tok/s" in stats
    assert "context " in stats
    assert "line 20" in screen.getvalue()
    handle(chat, "/thought")
    assert "line 20" in screen.rows()


@pytest.mark.parametrize(("max_tokens", "whole"), [(12, False), (None, True)])
def test_a_thought_that_was_cut_off_does_not_read_as_whole(
    max_tokens: int | None, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = on_screen(monkeypatch)
    handle(chat_with(Reciter(THOUGHT.format("so " * 20, 42)), max_tokens=max_tokens), "q")
    assert screen.rows()[0].startswith("thought for ")
    assert ("incomplete" in screen.rows()[0]) is not whole


def test_a_quiet_console_draws_no_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    view = ReasoningView(Terminal(quiet=True), "fold")
    view.add("Hm, so.")
    view.close(3)
    assert screen.getvalue() == ""


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        *(("abc", 3), ("思考", 4), ("e\u0301", 1), ("\u26a0", 1), ("\u26a0\ufe0f", 2), ("1\ufe0f\u20e3", 2)),
        *(("Donau\u00addampf", 11), ("\u06dd\u0661", 2), ("\u0645\u06cc\u200c\u062e", 3)),
    ],
)
def test_columns_that_a_text_takes(text: str, columns: int) -> None:
    assert width(text) == columns


def test_the_size_is_that_of_the_terminal_that_is_drawn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    sizes = {7: os.terminal_size((40, 10))}
    monkeypatch.setattr(screen, "fileno", lambda: 7)
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: sizes[descriptor])
    terminal = Terminal()
    assert (terminal.columns, terminal.rows) == (40, 10)
    sizes[7] = os.terminal_size((0, 0))  # a terminal that has no known size
    assert (terminal.columns, terminal.rows) == (80, 24)


def test_an_error_takes_an_unfinished_bar_away(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    terminal = Terminal()
    terminal.prompt_progress(300, 600)
    assert "reading the prompt: " in screen.getvalue()
    terminal.error("no memory")
    assert screen.getvalue().rpartition("\r")[2] == "error: no memory\n"


def test_a_thought_never_takes_more_rows_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    view = ReasoningView(Terminal(), "fold")
    for _ in range(30):
        view.add("some words of a thought 思考\n\n" + "x" * 200)
        assert len(screen.rows()) <= ROWS + 1
        assert all(width(row) < 80 for row in screen.rows())
    view.close(9)
    assert len([row for row in screen.rows() if row]) == 1


def test_a_thought_in_a_window_that_becomes_narrower_leaves_no_rows_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    view = ReasoningView(Terminal(), "fold", "Ctrl-C: answer now")
    view.add("")
    assert screen.rows(24) == ["thinking... (Ctrl-C: ans", "wer now)"]  # as a terminal of 24 columns breaks it
    monkeypatch.setenv("COLUMNS", "24")
    for number in range(20):
        view.add(f"and {number}\n")
    assert screen.rows(24) == ["thinking...", *(f"  and {number}" for number in range(21 - ROWS, 20))]
    view.close(3)
    assert re.fullmatch(r"thought for \d+\.\d s, 3", screen.rows(24)[0])


@pytest.mark.parametrize(("mode", "seen"), [("show", True), ("hide", False)])
def test_thoughts_stay_or_are_hidden(mode: str, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    handle(chat_with(Reciter(THOUGHT.format("so", 42)), mode), "q")
    assert ("Hm, so." in screen.rows()) is seen
    assert ("\x1b[2mH" in screen.getvalue()) is seen
    assert "It is 42." in screen.rows()


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    evil = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\re\ttab\nend"
    terminal = Terminal()
    terminal.text(evil)
    terminal.notice(evil)
    ReasoningView(terminal, "show").add(evil)
    for markdown in (False, True):
        text = answer_text(terminal, markdown=markdown)
        text.add(evil)
        text.close(complete=True)
    written = re.sub("\x1b\\[(\\d+m|\\d+D|K)", "", screen.getvalue())
    assert not set(written) & {"\x1b", "\x07", "\x9b", "\r"}
    assert written.startswith("a]0;titleb[2Jc31mde\ttab\nend\n")
    assert "a]0;titleb[2Jc31mde    tab\nend\n" in written
    assert without_control_characters("safe\u202egnp.exe") == "safegnp.exe"
    assert without_control_characters("é 👩‍👩‍👧 \u0301") == "é 👩‍👩‍👧 \u0301"


def test_a_path_is_not_broken_by_wrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    Terminal().notice(f"using {'/a-directory' * 10}/model and some words that follow it, on the next line")
    assert f"\n{'/a-directory' * 10}/model and" in screen.getvalue()


def test_no_color_means_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    handle(chat_with(Reciter(THOUGHT.format("so", 42))), "q")
    assert not re.search(r"\x1b\[\d*m", screen.getvalue())
    monkeypatch.setenv("TERM", "dumb")
    start = len(screen.getvalue())
    handle(chat_with(Reciter(THOUGHT.format("so", 42))), "q")
    assert "\x1b" not in screen.getvalue()[start:]


def test_a_notice_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_with(Reciter("a", "b"), temperature=0)
    handle(chat, "q")
    handle(chat, "r")
    assert capsys.readouterr().err.count("greedy sampling") == 1


def test_lines_are_broken_between_words_in_a_narrow_window(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("COLUMNS", "30")
    handle(chat_with(Reciter()), "/help")
    handle(chat_with(Reciter()), "/retyr")
    rows = screen.rows(30)
    assert "error: unknown command" in rows
    assert "  /undo" in " ".join(rows)


@pytest.mark.parametrize(
    ("kept", "told"), [(True, " (once on this machine for each kind of model and cache)"), (False, "")]
)
def test_kernels_are_compiled_once_where_they_can_be_stored(
    kept: bool, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("npqwen.kernels.compiled.is_writable", lambda: kept)
    terminal = Terminal()
    terminal.compilation_progress(0, 2)
    terminal.compilation_progress(1, 2)
    assert capsys.readouterr().err == f"compiling kernels{told}\n"
