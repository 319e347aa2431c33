"""`npqwen chat`: commands, what is shown and what is not, one answer, and a conversation in a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reciter import Reciter

import npqwen
from npqwen.commands import cli
from npqwen.model import Model
from npqwen.terminal.answer_view import AnswerView
from npqwen.terminal.console import Console
from npqwen.terminal.control_characters import without_control_characters
from npqwen.terminal.history import ENTRIES, LONGEST, History
from npqwen.terminal.prompt_line import PromptLine
from npqwen.terminal.screen import Terminal
from npqwen.terminal.settings import Settings
from npqwen.terminal.slash_commands import COMMANDS, is_command, words
from npqwen.terminal.talk import Talk
from npqwen.terminal.thought_view import ROWS, ThoughtView, width

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
THOUGHT = "<think>\nHm, {}.\n</think>\n\nIt is {}."
SUM = "What is 17 + 25?"


class Screen(io.StringIO):
    """A terminal to write to."""

    def isatty(self) -> bool:
        return True

    def rows(self, columns: int = 80) -> list[str]:
        """What is on the screen in the end, of the sequences that are used here."""
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


def talk_with(model: Any, view: Any = "fold", **options: Any) -> Talk:
    if isinstance(model, Reciter):
        model.bits, model.threads = 4, 1  # type: ignore[attr-defined]
    terminal = Terminal(Console())
    fixed = {name: options.pop(name) for name in ("system", "thinking") if name in options}
    return Talk(model, terminal, AnswerView(terminal, view), Settings(model, **options), name="m", **fixed)


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """say(talk, line): what is written, stdout and stderr."""

    def say(talk: Talk, *lines: str) -> str:
        for line in lines:
            talk.obey(line)
        done = capsys.readouterr()
        return done.out + done.err

    return say


# --- commands ---


def test_help_names_every_command(say: Say) -> None:
    told = say(talk_with(Reciter()), "/help")
    assert all(f"/{name}" in told for name in COMMANDS)
    wanted = ["think", "nothink", "system", "set", "save", "load", "retry", "undo", "clear", "stats", "exit"]
    assert all(f"/{name} " in told for name in wanted)


def test_an_unknown_command_is_refused_with_the_nearest(say: Say) -> None:
    talk = talk_with(Reciter())
    assert "error: there is no command /retyr; did you mean /retry?" in say(talk, "/retyr")
    assert "/help lists them" in say(talk, "/zzzzzz")
    assert "takes nothing after it" in say(talk, "/undo 3")
    assert talk.conversation.messages == []


@pytest.mark.parametrize("said", ["/usr/bin is what?", " /help", "// a\n/ b", "/nothing\nelse", "1/2?"])
def test_what_only_begins_like_a_command_is_said_to_the_model(said: str, say: Say) -> None:
    assert not is_command(said)
    talk = talk_with(Reciter("Yes."))
    say(talk, said)
    assert talk.conversation.messages[0]["content"] == said


def test_think_and_nothink_switch_and_with_a_question_only_once(say: Say) -> None:
    model = Reciter("<think>\n\n</think>\n\na", "b", "c")
    talk = talk_with(model)
    say(talk, "/nothink")
    assert talk.conversation.thinking is False
    say(talk, "/think why?", "so?", "/think")
    assert model.prompts[0].endswith("why?<|im_end|>\n<|im_start|>assistant\n")
    assert model.prompts[1].endswith("</think>\n\n")
    assert talk.conversation.thinking is True


@pytest.mark.parametrize(
    ("template", "line", "why"),
    [("instruct-2507", "/think", "does not think"), ("thinking-2507", "/no_think", "always thinks")],
)
def test_a_model_without_the_switch_refuses_it(template: str, line: str, why: str, say: Say) -> None:
    talk = talk_with(Reciter(template=template))
    assert why in say(talk, line)
    assert talk.conversation.thinking is None


def test_system_is_shown_set_and_taken_away(say: Say) -> None:
    model = Reciter("a", "b")
    talk = talk_with(model, system="Be brief.")
    assert "Be brief." in say(talk, "/system")
    say(talk, "/system Be\nlong.", "x")
    assert model.prompts[0].startswith("<|im_start|>system\nBe\nlong.<|im_end|>")
    say(talk, "/system -", "y")
    assert model.prompts[1].startswith("<|im_start|>user\nx")


def test_set_is_checked_as_the_api_does(say: Say) -> None:
    talk = talk_with(Reciter(), temperature=0.5)
    assert "unknown option 'temprature'; did you mean temperature?" in say(talk, "/set temprature 1")
    assert "must be a number from 0 to 1" in say(talk, "/set top_p 3")
    assert "top_k is 'x'; it must be a whole number, or default" in say(talk, "/set top_k x")
    assert "needs a value" in say(talk, "/set top_k")
    assert "max_tokens is 0" in say(talk, "/set max_tokens 0")
    assert talk.settings.options == {"temperature": 0.5}
    say(talk, "/set top-k 7", "/set loop_guard off", "/set temperature default")
    assert talk.settings.options == {"top_k": 7, "loop_guard": False}
    table = say(talk, "/set")
    assert re.search(r"top_k +7 +yours\n", table)
    assert re.search(r"temperature +0\.6\n", table)
    say(talk, "/nothink")
    assert re.search(r"temperature +0\.7\n", say(talk, "/set"))


def test_settings_reach_the_answer(say: Say) -> None:
    talk = talk_with(Reciter("one two three four", "a b c"))
    assert "cut off at max_tokens" in say(talk, "/set max_tokens 2", "x")
    assert "cut off" not in say(talk, "/set max_tokens default", "x")


def test_retry_undo_and_clear(say: Say) -> None:
    talk = talk_with(Reciter("first", "second", "third"), system="s", thinking=False)
    assert "nothing was asked yet" in say(talk, "/retry")
    assert "nothing was asked yet" in say(talk, "/undo")
    say(talk, "q", "/retry")
    assert [message["content"] for message in talk.conversation.messages] == ["s", "q", "second"]
    assert "taken back: q" in say(talk, "/undo")
    assert len(talk.conversation.messages) == 1
    say(talk, "q")
    assert "but the system message" in say(talk, "/clear")
    assert len(talk.conversation.messages) == 1


def test_retry_with_a_seed_draws_anew(monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    talk = talk_with(Reciter("a", "b", "c"), seed=5)
    say(talk, "q")
    seeds = []
    retry = talk.conversation.stream_retry
    monkeypatch.setattr(talk.conversation, "stream_retry", lambda **o: seeds.append(o["seed"]) or retry(**o))
    say(talk, "/retry", "/retry")
    assert seeds == [6, 7]
    assert "the same answer" in say(talk_with(Reciter("a", "b"), temperature=0), "q", "/retry")


def test_save_and_load(model: Model, tmp_path: Path, say: Say) -> None:
    talk = talk_with(model, temperature=0, thinking=False)
    assert "needs the name of a file" in say(talk, "/save")
    say(talk, SUM)
    path = tmp_path / "talk.json"
    assert "2 messages in" in say(talk, f"/save {path}")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["talk.json", "talk.json.cache"]
    assert json.loads(path.read_text())["thinking"] is False
    other = talk_with(model, temperature=0)
    assert "2 messages from" in say(other, f"/load {path}")
    assert other.conversation.thinking is False
    assert other.conversation.messages == talk.conversation.messages
    assert other.conversation.tokens == talk.conversation.tokens > 0
    assert "30 + 12 = 42" in say(other, "What is 30 + 12?", "/save")
    assert len(json.loads(path.read_text())["messages"]) == 4


def test_save_spares_a_file_of_somebody_else_and_load_refuses_it(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    talk = talk_with(Reciter())
    assert "is no saved conversation" in say(talk, f"/save {path}")
    assert "is no saved conversation" in say(talk, f"/load {path}")
    assert path.read_text() == "mine"
    assert "is no saved conversation" in say(talk, f"/load {tmp_path / 'none.json'}")


def test_a_saved_state_of_thinking_that_this_model_lacks_is_told(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "talk.json"
    saved = {"format": "npqwen-conversation", "version": 1, "dropped": 0, "thinking": False, "messages": []}
    path.write_text(json.dumps(saved))
    talk = talk_with(Reciter(template="thinking-2507"))
    assert "this one has none" in say(talk, f"/load {path}")
    assert talk.conversation.thinking is None
    path.write_text(json.dumps(saved | {"thinking": "no"}))
    assert "is damaged" in say(talk, f"/load {path}")


def test_stats(model: Model, say: Say) -> None:
    talk = talk_with(model, temperature=0, thinking=False)
    say(talk, SUM, "What is 30 + 12?")
    told = say(talk, "/stats")
    assert "4 messages" in told
    assert f"of {model.context:,}" in told
    assert "all answers   2:" in told


def test_exit_leaves(say: Say) -> None:
    for line in ("/exit", "/quit"):
        talk = talk_with(Reciter())
        say(talk, line)
        assert talk.over


def test_tab_completes_commands_and_options() -> None:
    assert list(words("/th")) == ["/think", "/thought"]
    assert list(words("top")) == ["top_k", "top_p"]


# --- what is shown ---


def test_an_error_is_a_line_and_the_conversation_goes_on(say: Say) -> None:
    talk = talk_with(Reciter("Yes.", context=64))
    told = say(talk, "word " * 100)
    assert told.count("\n") == 1
    assert told.startswith("error: the last turn alone")
    assert "Yes." in say(talk, "q")


def test_a_thought_is_folded_to_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    talk = talk_with(Reciter(THOUGHT.format("\n".join(f"line {n}" for n in range(40)), 42)))
    talk.obey("q")
    assert "\x1b[2m  line 39." not in screen.rows()
    first, answer, stats = screen.rows()[:3]
    assert re.fullmatch(r"thought for \d+\.\d s, \d+ tokens; /thought shows it", first)
    assert answer == "It is 42."
    assert "tok/s" in stats
    assert "context " in stats
    assert "line 20" in screen.getvalue()
    talk.obey("/thought")
    assert "line 20" in screen.rows()


def test_a_thought_never_takes_more_rows_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    view = ThoughtView(Terminal(Console()), "fold")
    for _ in range(30):
        view.add("some words of a thought 思考\n\n" + "x" * 200)
        assert len(screen.rows()) <= ROWS + 1
        assert all(width(row) < 80 for row in screen.rows())
    view.close(9)
    assert len([row for row in screen.rows() if row]) == 1


@pytest.mark.parametrize(("view", "seen"), [("show", True), ("hide", False)])
def test_thoughts_stay_or_are_hidden(view: str, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    talk_with(Reciter(THOUGHT.format("so", 42)), view).obey("q")
    assert ("Hm, so." in screen.rows()) is seen
    assert ("\x1b[2mH" in screen.getvalue()) is seen
    assert "It is 42." in screen.rows()


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    evil = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\re\ttab\nend"
    terminal = Terminal(Console())
    terminal.answer(evil)
    terminal.notice(evil)
    ThoughtView(terminal, "show").add(evil)
    written = screen.getvalue().replace("\x1b[2m", "").replace("\x1b[22m", "")
    assert not set(written) & {"\x1b", "\x07", "\x9b", "\r"}
    assert written.startswith("a]0;titleb[2Jc31mde\ttab\nend\n")
    assert without_control_characters("é 👩‍👩‍👧 \u0301") == "é 👩‍👩‍👧 \u0301"


def test_no_color_means_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    talk_with(Reciter(THOUGHT.format("so", 42))).obey("q")
    assert not re.search(r"\x1b\[\d*m", screen.getvalue())
    monkeypatch.setenv("TERM", "dumb")
    start = len(screen.getvalue())
    talk_with(Reciter(THOUGHT.format("so", 42))).obey("q")
    assert "\x1b" not in screen.getvalue()[start:]


def test_a_notice_is_told_once(say: Say) -> None:
    talk = talk_with(Reciter("a", "b"), temperature=0)
    assert say(talk, "q", "r").count("greedy sampling") == 1


def test_lines_are_broken_between_words_in_a_narrow_window(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("COLUMNS", "30")
    talk_with(Reciter()).obey("/help")
    talk_with(Reciter()).obey("/retyr")
    rows = screen.rows(30)
    assert "error: there is no command" in rows
    assert "  /undo" in " ".join(rows)


# --- reading ---


def lines(monkeypatch: pytest.MonkeyPatch, *typed: str) -> PromptLine:
    rest = list(typed)
    monkeypatch.setattr("npqwen.terminal.prompt_line._more_waits", lambda: False)
    line = PromptLine()
    monkeypatch.setattr(line, "_input", lambda prompt: rest.pop(0))
    return line


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
        (['/system """', "a", 'b"""'], "/system a\nb"),
        (['say """ twice'], 'say """ twice'),
        (["caf\udce9"], "caf\ufffd"),
    ],
)
def test_messages_of_several_lines(typed: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, *typed).read() == message


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


# --- one answer ---


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    def command(model: Any, *args: str, stdin: str = "") -> SimpleNamespace:
        model.bits, model.threads, model.close = 4, 1, lambda: None
        monkeypatch.setattr("npqwen.commands.options.open_model", lambda *_: model)
        monkeypatch.setattr("npqwen.commands.chat.open_model", lambda *_: model)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as exit:
            cli.main(["chat", "m", *args])
        done = capsys.readouterr()
        return SimpleNamespace(status=exit.value.code, out=done.out, err=done.err)

    return command


Command = Callable[..., SimpleNamespace]


def test_one_question_gives_the_answers_text_alone(run: Command) -> None:
    done = run(Reciter(THOUGHT.format("so", 42)), "What?")
    assert (done.status, done.out) == (0, "It is 42.")
    assert "tok/s" in done.err
    assert "\x1b" not in done.err
    assert "Hm" not in done.err
    assert run(Reciter("Yes."), "What?", "-q").err == ""
    assert "Hm, so." in run(Reciter(THOUGHT.format("so", 42)), "What?", "--show-thinking").err


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        ([], "From a pipe\n", "From a pipe"),
        (["Sum up:"], "a\nb\n", "Sum up:\n\na\nb"),
        (["Just this"], "", "Just this"),
        (["-"], "x\n", "x"),
    ],
)
def test_stdin_is_the_message_or_joined_to_it(args: list[str], stdin: str, message: str, run: Command) -> None:
    model = Reciter("Yes.")
    assert run(model, *args, stdin=stdin).out == "Yes."
    assert f"user\n{message}<|im_end|>" in model.prompts[0]


@pytest.mark.parametrize(
    ("args", "template", "message"),
    [
        ([], "hybrid", "there is no question"),
        (["q", "--think"], "instruct-2507", "does not think"),
        (["q", "--no-think"], "thinking-2507", "always thinks"),
        (["q", "--thinking-budget", "-1"], "hybrid", "thinking_budget is -1"),
        (["q", "--top-p", "2"], "hybrid", "top_p is 2"),
    ],
)
def test_errors_are_one_line_and_status_2(args: list[str], template: str, message: str, run: Command) -> None:
    done = run(Reciter(template=template), *args)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("npqwen: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_model_without_a_template_is_told_about_generate(run: Command) -> None:
    from npqwen.chat.chat_template import ChatTemplate

    base = Reciter()
    base.chat_template = ChatTemplate({}, {}, Path("base"))
    done = run(base, "q")
    assert done.status == 2
    assert "no chat template" in done.err
    assert "generate" in done.err


# --- a real terminal ---

CHILD = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from npqwen.model import Model
forward = Model.forward
def slow(*args, **options):
    time.sleep(float(sys.argv[1]))
    return forward(*args, **options)
Model.forward = slow
from npqwen.commands.cli import main
main(sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no pty")
def test_in_a_terminal(tiny: Callable[[int], Path], tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("NO_COLOR", None)
    arguments = ["chat", str(tiny(4)), "--threads", "1", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, "0.05", *arguments],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment,
    )  # fmt: skip
    os.close(slave)
    seen = ""

    def until(text: str, seconds: float = 60) -> str:
        """What is written up to the text."""
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            ready, _, _ = select.select([master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} after {seen!r}"
            seen += os.read(master, 4096).decode("utf-8", "replace")
        at = seen.index(text) + len(text)
        before, seen = seen[:at], seen[at:]
        return before

    def send(text: str) -> None:
        os.write(master, text.encode())

    def interrupt() -> None:
        """As a hand does: Python sees a Ctrl-C only once readline waits again after what it has just shown."""
        time.sleep(0.3)
        send("\x03")

    try:
        until("/help lists the commands")
        until("> ")
        send(f"{SUM}\n")
        shown = until("17 + 25 = 42")
        assert "\x1b[2m" in shown
        assert "thought for " in shown
        until("context ")
        until("> ")
        send("Define river.\n")
        until("thinking...")
        send("\x03")
        until("stopped")
        until("taken back")
        until("> ")
        send("half a line")
        until("half a line")
        interrupt()
        assert "once more" not in until("> ")
        send("/nonsense\n")
        until("there is no command /nonsense")
        until("> ")
        interrupt()
        until("once more")
        until("> ")
        send("/nothink\n")
        until("without a thought")
        until("> ")
        send("\x1b[200~What is\n11 + 31?\x1b[201~\n")
        until("tok/s")
        until("> ")
        send("/exit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
