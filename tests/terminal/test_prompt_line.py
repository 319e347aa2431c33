"""Reading what somebody says in the terminal: messages of several lines, history, Tab."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
from fake_terminal import Readline

from npqwen.terminal.history import ENTRIES, LONGEST, History
from npqwen.terminal.prompt_line import PromptLine


def lines(monkeypatch: pytest.MonkeyPatch, *typed: str) -> PromptLine:
    rest = list(typed)
    monkeypatch.setattr("npqwen.terminal.prompt_line._more_waits", lambda: False)
    line = PromptLine()

    def read(prompt: str) -> str:
        if not rest:
            raise EOFError
        return rest.pop(0)

    monkeypatch.setattr(line, "_input", read)
    return line


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
        (['"""one\\', "two\\", 'three"""'], "one\\\ntwo\\\nthree"),
        (['/system """', "a", 'b"""'], "/system a\nb"),
        (['say """ twice'], 'say """ twice'),
        (["caf\udce9"], "caf\ufffd"),
    ],
)
def test_messages_of_several_lines(typed: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, *typed).read() == message


def test_a_line_before_the_end_of_the_input_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    line = lines(monkeypatch, "bye")
    monkeypatch.setattr("npqwen.terminal.prompt_line._more_waits", lambda: True)  # so it is at the end of a file
    monkeypatch.setattr(line, "_pastes", False)
    assert line.read() == "bye"
    with pytest.raises(EOFError):
        line.read()


def test_tab_completes_what_is_behind_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    readline = Readline(monkeypatch)
    asked = []

    def words(before: str, start: str) -> list[str]:
        asked.append((before, start))
        return ["top_k", "top_p"]

    PromptLine(words=words)
    readline.line, readline.begin = "/set top", 5
    assert [readline.complete("top", at) for at in range(3)] == ["top_k", "top_p", None]
    assert set(asked) == {("/set ", "top")}


def test_what_readline_cannot_hold_is_in_the_file_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readline = Readline(monkeypatch)
    history = History(tmp_path / "history")
    for entry in ("caf\u00e9", "\ud800", "nul \0", "plain"):
        history.add(entry)
    line = PromptLine(history)
    assert readline.items == ["plain"]
    monkeypatch.setattr(line, "_input", lambda prompt: "th\u00e9")
    assert line.read() == "th\u00e9"
    assert readline.items == ["plain"]
    assert history.entries()[-1] == "th\u00e9"


def test_history_is_private_bounded_and_survives_damage(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history"
    history = History(path)
    assert history.entries() == []
    history.add("two\nlines")
    history.add("x" * (LONGEST + 1))
    assert History(path).entries() == ["two\nlines"]
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with open(path, "ab") as file:
        file.write(b'\xff\xfe{"a": 1}\n[1]\n' + b'"x"\n' * (2 * ENTRIES))
    assert len(History(path).entries()) == ENTRIES
    assert len(path.read_text().splitlines()) == ENTRIES
    blocked = History(path / "below")
    blocked.add("x")
    assert not blocked.kept
