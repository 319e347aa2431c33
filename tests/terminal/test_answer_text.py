"""Text on stdout and lines on stderr, in files, pipes and terminals."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_terminal import THOUGHT, chat_with, emulated, on_screen
from reciter import Reciter

from npqwen.errors import OutOfMemoryError
from npqwen.terminal.answer_text import PipedText, answer_text
from npqwen.terminal.repl import handle
from npqwen.terminal.terminal import Terminal, wait_for_reader

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")


def piped(*pieces: str, exact: bool = False, complete: bool = True) -> None:
    text = PipedText(Terminal(), exact=exact)
    for piece in pieces:
        text.add(piece)
    text.close(complete=complete)


@pytest.mark.parametrize(
    ("pieces", "answer", "exact"),
    [
        (["Yes."], "Yes.\n", "Yes.\n"),
        (["Yes.\n"], "Yes.\n", "Yes.\n\n"),
        (["a\n", "\n", "\n", "b", "\n\n"], "a\n\n\nb\n", "a\n\n\nb\n\n\n"),
        ([], "\n", "\n"),
        (["**a** \x1b[1m", " "], "**a** \x1b[1m \n", "**a** \x1b[1m \n"),
    ],
)
def test_text_in_a_pipe_ends_with_one_newline(
    pieces: list[str], answer: str, exact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(*pieces)
    assert capsys.readouterr().out == answer
    piped(*pieces, exact=True)
    assert capsys.readouterr().out == exact


def test_an_interrupted_text_ends_with_a_newline_if_it_began(capsys: pytest.CaptureFixture[str]) -> None:
    piped("Ye", complete=False)
    assert capsys.readouterr().out == "Ye\n"
    piped(complete=False)
    assert capsys.readouterr().out == ""


def test_many_newlines_take_no_more_than_linear_time() -> None:
    text = PipedText(Terminal(), exact=False)
    for _ in range(10_000):
        text.add("\n")
    assert vars(text)["_newlines"] == 10_000  # counted, not collected


def test_each_answer_of_a_conversation_ends_with_a_newline(capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_with(Reciter("**One.**\n\n", THOUGHT.format("so", 2), "Three."))
    for _ in range(3):
        handle(chat, "q")
    output = capsys.readouterr()
    assert output.out == "**One.**\nIt is 2.\nThree.\n"
    assert output.err.count("tok/s") == 3


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def test_a_notice_does_not_touch_the_text_of_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    handle(chat_with(Reciter(f"Before\n{CALL}\nafter")), "q")
    output = capsys.readouterr()
    assert output.out == "Before\nafter\n"
    assert "calls f with {}" in output.err


def test_a_notice_on_the_terminal_is_between_the_parts_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    handle(chat_with(Reciter(f"**Be**fore\n{CALL}\nafter")), "q")
    assert screen.rows()[:3] == ["Before", "calls f with {}; no tools are available", "after"]


@pytest.mark.parametrize(
    ("term", "no_color", "markdown", "row", "styled"),
    [
        ("xterm", "", True, "Some bold text", True),
        ("xterm", "1", True, "Some **bold** text", False),
        ("xterm", "", False, "Some **bold** text", False),
        ("dumb", "", True, "Some **bold** text", False),
    ],
)
def test_when_markdown_is_rendered(
    term: str, no_color: str, markdown: bool, row: str, styled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", no_color)
    chat = chat_with(Reciter("Some **bold** text\n- item"))
    handle(chat, f"/markdown {'on' if markdown else 'off'}")
    start = len(screen.getvalue())
    handle(chat, "q")
    assert row in screen.rows()
    assert ("\x1b[1m" in screen.getvalue()[start:]) is styled
    assert ("• item" in screen.rows()) is (markdown and term != "dumb")
    if term == "dumb":
        assert "\x1b" not in screen.getvalue()


def test_without_markdown_words_wrap_too_and_indentation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("COLUMNS", "24")
    text = answer_text(Terminal())
    for letter in "\n\nSome **words** that wrap,\n    indented words that wrap\n\tx\n\n":
        text.add(letter)
    text.close(complete=True)
    assert screen.rows(24) == [
        "Some **words** that",
        "wrap,",
        "    indented words that",
        "    wrap",
        "        x",
        "",
    ]


def test_shown_reasoning_and_statistics_wrap_at_words(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("COLUMNS", "30")
    words = "some more words of a thought " * 3
    handle(chat_with(Reciter(THOUGHT.format(words, 42)), "show"), "q")
    rows = screen.rows(30)
    assert rows[0] == "Hm, some more words of a"
    assert rows[1] == "thought some more words of a"
    known = f"Hm, {words}".split()
    assert all(word.rstrip(".,") in " ".join(known) for row in rows[:4] for word in row.split())
    assert sum(row.endswith(("tokens,", "tok/s,", "first", "after")) for row in rows) >= 1


# --- programs and shells ---

CHILD = """
import sys
sys.path[:0] = sys.argv[1:3]
from reciter import Reciter
import npqwen.commands.chat, npqwen.commands.generate
model = Reciter(*sys.argv[3].split("|"), template="instruct-2507")
for place in (npqwen.commands.chat, npqwen.commands.generate):
    place.open_model = lambda *rest, **options: model
from npqwen.commands.cli import main
main(sys.argv[4:])
"""
TESTS = Path(__file__).parents[1]


def shell(script: str, answer: str, *arguments: str) -> str:
    """What the script writes to stdout; in it, "$@" is npqwen with a model that answers so."""
    program = [sys.executable, "-c", CHILD, str(TESTS), str(TESTS.parent), answer, *arguments]
    done = subprocess.run(["sh", "-c", script, "sh", *program], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_statistics_are_a_line_of_their_own_where_both_streams_are_one(command: str) -> None:
    text, statistics, end = shell('"$@" 2>&1 < /dev/null | cat', "Yes.", command, "m", "q").split("\n")
    assert (text, end) == ("Yes.", "")
    assert "tok/s" in statistics


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
def test_text_in_a_file_and_a_pipe_is_text_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f'for n in 1 2; do "$@" < /dev/null 2> /dev/null | tee -a {log}; done'
    assert shell(script, "**Yes.**", "chat", "m", "q") == log.read_text() == "**Yes.**\n**Yes.**\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no pty")
def test_text_that_another_program_shows_late_is_not_glued_to_statistics(tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    try:
        over = tmp_path / "over"
        script = f'{{ "$@" < /dev/null; : > {over}; }} | {{ until [ -e {over} ]; do sleep 0.1; done; cat >&2; }}'
        program = [sys.executable, "-c", CHILD, str(TESTS), str(TESTS.parent), "Yes.", "chat", "m", "q"]
        subprocess.run(["sh", "-c", script, "sh", *program], stdout=slave, stderr=slave, timeout=300, check=True)
        written = os.read(master, 10_000).decode().replace("\r", "")
    finally:
        os.close(slave)
        os.close(master)
    statistics, text = (row.strip() for row in emulated(written, 80).display if row.strip())
    assert "tok/s" in statistics
    assert text == "Yes."


@pytest.mark.skipif(sys.platform == "win32", reason="does not wait there")
def test_statistics_wait_for_a_reader_that_is_not_much_later() -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"text")
        reader = threading.Timer(0.05, os.read, (read, 100))
        reader.start()
        wait_for_reader(write, 60)
        assert select.select([read], [], [], 0)[0] == []
        reader.join()
        os.write(write, b"text")
        wait_for_reader(write, 0.01)  # nobody reads
        assert select.select([read], [], [], 0)[0] == [read]
    finally:
        os.close(read)
        os.close(write)


# --- what interrupts a text ---


class Failing(Reciter):
    """Raises `error` at its fifth pass."""

    error: type[BaseException]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if len(self.calls) == 5:
            raise self.error("no room")
        return super().forward(*arguments, **options)


@pytest.mark.parametrize("error", [OutOfMemoryError, KeyboardInterrupt])
def test_a_text_that_breaks_off_ends_with_a_newline(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    model = Failing("One two three four five six seven.", template="instruct-2507")
    model.error = error
    handle(chat_with(model), "q")
    text = capsys.readouterr().out
    assert text.endswith("\n")
    assert "One two three four five six seven.".startswith(text[:-1])
    assert 0 < len(text) < 30


def test_what_was_held_back_is_shown_as_written_when_the_text_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    model = Failing("**One two three four five six seven.**", template="instruct-2507")
    model.error = KeyboardInterrupt
    handle(chat_with(model), "q")
    first, second, *_ = screen.rows()
    assert first.startswith("**One")
    assert second.startswith("stopped, ")


@pytest.mark.parametrize("text", ["", "Yes", "Yes\n"])
def test_ctrl_c_leaves_the_cursor_at_the_beginning_of_a_row(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)

    def interrupted() -> None:
        with Terminal() as terminal:
            terminal.text(text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert screen.getvalue() == text.rstrip("\n") + "\n"
