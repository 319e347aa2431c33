"""Reading messages in the terminal: several lines, paste, history, Tab, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import io
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from prompt_toolkit.output.vt100 import Vt100_Output

from npqwen.terminal.completions import completions
from npqwen.terminal.history import MAX_ENTRIES, MAX_LENGTH, History
from npqwen.terminal.line_editor import LineEditor, PlainReader, message_reader

UP, ALT_ENTER = "\x1b[A", "\x1b\r"
CTRL_C, CTRL_D = "\x03", "\x04"

Editor = Callable[..., LineEditor]


@pytest.fixture
def editor() -> Iterator[Editor]:
    """editor(keys, history): a line editor at which these keys are pressed."""
    with create_pipe_input() as pipe:

        def editor(keys: str, history: History | None = None) -> LineEditor:
            pipe.send_text(keys)
            return LineEditor(history, completions, pipe, DummyOutput())

        yield editor


def pasted(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


MESSAGES = [
    ("one\r", "one"),
    ("one\\\rtwo\\\rthree\r", "one\ntwo\nthree"),
    ('"""\rone\r\rtwo\r"""\r', "one\n\ntwo"),
    ('"""one\rtwo"""\r', "one\ntwo"),
    ('"""one"""\r', "one"),
    ('"""one\\\rtwo\\\rthree"""\r', "one\\\ntwo\\\nthree"),
    ('/system """\ra\rb"""\r', "/system a\nb"),
    ('say """ twice\r', 'say """ twice'),
]


@pytest.mark.parametrize(("keys", "message"), MESSAGES)
def test_messages_of_several_lines(keys: str, message: str, editor: Editor) -> None:
    assert editor(keys).read() == message


@pytest.mark.parametrize(("keys", "message"), MESSAGES)
def test_messages_of_several_lines_without_an_editor(
    keys: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(keys.replace("\r", "\n") + "next\n"))
    reader = PlainReader()
    assert reader.read() == message
    assert reader.read() == "next"
    with pytest.raises(EOFError):
        reader.read()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (f"one{ALT_ENTER}two\r", "one\ntwo"),
        (pasted("one\r\ntwo\rthree\\\n") + "\r", "one\ntwo\nthree\\\n"),
        (pasted("def f():\n\treturn 1") + "\r", "def f():\n\treturn 1"),
        ("see " + pasted("a\nb") + " there\r", "see a\nb there"),
        (pasted('"""A module."""\n\nimport os') + "\r", '"""A module."""\n\nimport os'),
        (pasted('"""A module."""\n\n"""') + "\r", '"""A module."""\n\n"""'),
        (pasted('"""one"""\n') + "\r", "one"),
        (pasted('"""\n"""A docstring."""\nimport os\n"""') + "\r", '"""A docstring."""\nimport os'),
        (f"\x1b[200~/exit\n\x1b[201~{CTRL_D}", "/exit\n"),
        ("a\nb\r", "a"),  # some terminals send line feeds for Enter
        ('"""one\rtwo\x1b[Dx\x1b[F"""\r', "one\ntwxo"),
    ],
)
def test_pasted_and_added_lines(keys: str, message: str, editor: Editor) -> None:
    assert editor(keys).read() == message


def test_ctrl_d_leaves_an_empty_line_only(editor: Editor) -> None:
    with pytest.raises(EOFError):
        editor(CTRL_D).read()
    assert editor(f"ab\x01{CTRL_D}\r").read() == "b"
    assert editor(f"ab{CTRL_D}\r").read() == "ab"


def test_ctrl_d_on_an_empty_line_of_a_block_ends_it(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert editor(f'"""one\r{CTRL_D}').read() == "one"
    monkeypatch.setattr(sys, "stdin", io.StringIO('"""one\n'))
    assert PlainReader().read() == "one"


def test_ctrl_c_tells_whether_something_was_typed(editor: Editor) -> None:
    for keys, empty in ((CTRL_C, True), (f"x{CTRL_C}", False), (f"x\\\r{CTRL_C}", False)):
        reader = editor(keys)
        with pytest.raises(KeyboardInterrupt):
            reader.read()
        assert reader.is_empty() is empty


def test_bytes_that_are_not_utf8_are_replaced(editor: Editor) -> None:
    assert editor("caf\u00e9 \U0001f389\r").read() == "caf\u00e9 \U0001f389"
    with create_pipe_input() as pipe:
        pipe.send_bytes(b"caf\xe9\r")
        assert LineEditor(input=pipe, output=DummyOutput()).read() == "caf\ufffd"


def test_tab_completes(editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my talk.json").touch()
    monkeypatch.chdir(tmp_path)
    assert editor("/retr\t\r").read() == "/retry"
    assert editor("/set temp\t 0.5\r").read() == "/set temperature 0.5"
    assert editor("/load my\t\r").read() == "/load my talk.json"
    assert editor("what\tis\r").read() == "whatis"


def test_arrows_recall_messages_of_this_and_earlier_runs(editor: Editor, tmp_path: Path) -> None:
    path = tmp_path / "history"
    first = editor('one\r"""two\rlines"""\r \r  \rone\rone\r', History(path))
    assert [first.read() for _ in range(6)] == ["one", "two\nlines", " ", "  ", "one", "one"]
    assert History(path).entries() == ["one", "two\nlines", "one"]
    assert editor(f"{UP}!\r", History(path)).read() == "one!"
    assert editor(f"{3 * UP}\r", History(path)).read() == "two\nlines"
    assert editor("new\r", History(path)).read() == "new"
    assert editor(f"{UP}\r", History(path)).read() == "new"


def test_keys_are_those_that_readline_is_configured_for(
    editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inputrc").write_text("# keys\nset bell-style none\nset editing-mode vi\n")
    monkeypatch.setenv("INPUTRC", str(tmp_path / "inputrc"))
    assert editor("two words\x1bbdw\r").read() == "two "
    monkeypatch.setenv("INPUTRC", str(tmp_path / "none"))
    assert editor("two words\x1bb\x0b\r").read() == "two "


def test_ctrl_r_searches_the_history(editor: Editor, tmp_path: Path) -> None:
    history = History(tmp_path / "history")
    for entry in ("first river", "second", "third"):
        history.add(entry)
    assert editor("\x12riv\r\r", history).read() == "first river"


@pytest.mark.parametrize(
    ("keys", "confirmed"),
    [("y\r", True), ("Yes \r", True), ("n\r", False), ("\r", False), ("yo\r", False), (CTRL_C, False), (CTRL_D, False)],
)
def test_only_yes_confirms(
    keys: str, confirmed: bool, editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "history"
    assert editor(keys, History(path)).confirm("Really?") is confirmed
    assert not path.exists()
    typed = "" if keys == CTRL_D else keys.replace("\r", "\n").replace(CTRL_C, "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert PlainReader().confirm("Really?") is confirmed


def written(keys: str, rows: int, columns: int) -> str:
    """What an editor in a window of this size writes after the last key."""
    stream = io.StringIO()
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        output = Vt100_Output(stream, lambda: Size(rows, columns), term="xterm")
        LineEditor(input=pipe, output=output).read()
    return stream.getvalue()


@pytest.mark.parametrize(("columns", "width"), [(40, 3), (10, 30)])
def test_a_message_taller_than_the_window_is_written_whole_once_it_is_sent(columns: int, width: int) -> None:
    lines = [f"{number} {'x' * width}" for number in range(30 if width == 3 else 4)]
    shown = "> " + "\n. ".join(lines) + "\n"
    assert written(pasted("\n".join(lines)) + "\r", 12, columns).replace("\r", "").endswith(shown)
    assert not written(pasted("\n".join(lines)) + "\r", 200, columns).replace("\r", "").endswith(shown)


def test_a_tall_message_shows_no_control_characters_and_is_moved_through_by_pages() -> None:
    shown = written(pasted("\n".join(["a\x1b[31mb\tc"] * 20)) + "\r", 8, 40)
    assert "\x1b[31m" not in shown
    with create_pipe_input() as pipe:
        pipe.send_text(pasted("\n".join(map(str, range(30)))) + "\x1b[5~\x1b[5~!\x1b[6~?\r")
        output = Vt100_Output(io.StringIO(), lambda: Size(12, 40), term="xterm")
        lines = LineEditor(input=pipe, output=output).read().split("\n")
    assert [line for line in lines if not line.isdigit()] == ["9!", "19?"]


def test_damaged_entries_are_not_recalled(editor: Editor, tmp_path: Path) -> None:
    history = History(tmp_path / "history")
    for entry in ("caf\u00e9", "\ud800"):
        history.add(entry)
    assert history.entries() == ["caf\u00e9"]
    assert editor(f"{UP}\r", history).read() == "caf\u00e9"


def test_history_is_private_bounded_and_survives_damage(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history"
    history = History(path)
    assert history.entries() == []
    history.add("two\nlines")
    history.add("x" * (MAX_LENGTH + 1))
    assert History(path).entries() == ["two\nlines"]
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with open(path, "ab") as file:
        file.write(b'\xff\xfe{"a": 1}\n[1]\n' + b'"x"\n' * (2 * MAX_ENTRIES))
    assert len(History(path).entries()) == MAX_ENTRIES
    assert len(path.read_text().splitlines()) == MAX_ENTRIES
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    blocked = History(path / "below")
    blocked.add("x")
    assert not blocked.kept


def test_a_dumb_terminal_gets_no_editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(message_reader(History(tmp_path / "history"), completions), PlainReader)
