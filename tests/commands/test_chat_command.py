"""`npqwen chat`: one answer, and a conversation in a real terminal."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_terminal import THOUGHT, chat_with
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from reciter import Reciter

from npqwen.commands import cli
from npqwen.commands.chat import converse
from npqwen.terminal.line_editor import LineEditor

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
SUM = "What is 17 + 25?"

# --- one answer ---


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    def command(model: Any, *args: str, stdin: str = "") -> SimpleNamespace:
        monkeypatch.setattr("npqwen.commands.chat.open_model", lambda *_, **__: model)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as exit:
            cli.main(["chat", "m", *args])
        done = capsys.readouterr()
        return SimpleNamespace(status=exit.value.code, out=done.out, err=done.err)

    return command


Command = Callable[..., SimpleNamespace]


def test_one_question_gives_the_answers_text_alone(run: Command) -> None:
    done = run(Reciter(THOUGHT.format("so", 42)), "What?")
    assert (done.status, done.out) == (0, "It is 42.\n")
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
    assert run(model, *args, stdin=stdin).out == "Yes.\n"
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


# A question in the argument, and a pipe on stdin that stays open: as a program that spawned us leaves it.
ASK = """
import sys
sys.path.insert(0, sys.argv[1])
from reciter import Reciter
import npqwen.commands.chat, npqwen.commands.options
from npqwen.commands.cli import main
model = Reciter("Yes.")
npqwen.commands.chat.open_model = lambda *_, **__: model
npqwen.commands.options.STDIN_NOTICE_SECONDS = float(sys.argv[2])
try:
    main(sys.argv[3:])
finally:
    sys.stderr.write(repr(model.prompts))
"""


WITHOUT_STDIN = "use $null | npqwen chat ..." if sys.platform == "win32" else f"add < {os.devnull}"


def asking(*arguments: str, patience: float = 0.05) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ASK, str(Path(__file__).parents[1]), str(patience), "chat", "m", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip


@pytest.mark.parametrize("text", ["and a lake?", ""])
def test_a_silent_stdin_is_told_and_what_comes_later_is_not_lost(text: str) -> None:
    with asking("What is a river?") as process:
        assert process.stderr is not None
        notice = process.stderr.readline()
        assert notice == (
            f"waiting for text on stdin, which is appended to the question; to ask without it, {WITHOUT_STDIN}\n"
        )
        assert process.poll() is None
        out, err = process.communicate(text, timeout=300)
    assert (process.returncode, out) == (0, "Yes.\n")
    message = f"What is a river?\\n\\n{text}" if text else "What is a river?"
    assert f"user\\n{message}<|im_end|>" in err


def test_waiting_for_a_question_is_told_too() -> None:
    with asking() as process:
        assert process.stderr is not None
        end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
        assert process.stderr.readline() == f"waiting for the question on stdin; {end} on an empty line ends it\n"
        out, err = process.communicate("Well?", timeout=300)
    assert (process.returncode, out) == (0, "Yes.\n")
    assert "user\\nWell?<|im_end|>" in err


@pytest.mark.parametrize(("arguments", "patience"), [(["-q"], 0.0), ([], 60.0)])
def test_stdin_that_is_quiet_or_has_text_needs_no_notice(arguments: list[str], patience: float) -> None:
    with asking("What?", *arguments, patience=patience) as process:
        out, err = process.communicate("more", timeout=300)
    assert (process.returncode, out) == (0, "Yes.\n")
    assert "waiting" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_the_wait_for_stdin() -> None:
    with asking("What?") as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("waiting for text")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "[]"


def test_a_model_without_a_template_is_told_about_generate(run: Command) -> None:
    from npqwen.chat.chat_template import ChatTemplate

    base = Reciter()
    base.chat_template = ChatTemplate({}, {}, Path("base"))
    done = run(base, "q")
    assert done.status == 2
    assert "no chat template" in done.err
    assert "generate" in done.err


# --- a conversation ---


@pytest.mark.skipif(sys.platform == "win32", reason="needs a link to nowhere")
def test_a_history_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").symlink_to(tmp_path / "nowhere")  # neither a directory nor a place for one
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "cache"))
    with create_pipe_input() as pipe:
        pipe.send_text("q\r/exit\r")
        monkeypatch.setattr(
            "npqwen.terminal.line_editor.message_reader",
            lambda history, completions: LineEditor(history, completions, pipe, DummyOutput()),
        )
        converse(chat_with(Reciter("Yes.")))
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"{tmp_path / 'cache' / 'history'} cannot be written: what you typed is not in the history"


# --- a real terminal ---

BACKGROUND = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from npqwen.terminal.terminal import Terminal
shell, job = os.getpgrp(), os.fork()
if job == 0:
    os.setpgid(0, 0)
    if sys.argv[1] == "later":
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.tcsetpgrp(0, os.getpgrp())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    with Terminal().echo_off():
        if sys.argv[1] == "later":
            os.tcsetpgrp(0, shell)
    os._exit(0)
status = os.waitpid(job, os.WUNTRACED)[1]
if os.WIFSTOPPED(status):
    os.kill(job, signal.SIGKILL)
    print("stopped")
print("ended" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else status)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no jobs")
@pytest.mark.parametrize("when", ["from the start", "later"])
def test_a_job_in_the_background_leaves_the_terminal_alone(when: str) -> None:
    import pty

    master, slave = pty.openpty()
    try:
        command = [sys.executable, "-c", BACKGROUND, when]
        done = subprocess.run(
            command, stdin=slave, capture_output=True, encoding="utf-8", start_new_session=True, timeout=300
        )
    finally:
        os.close(slave)
        os.close(master)
    assert (done.stdout, done.stderr) == ("ended\n", "")


def test_the_line_editor_is_only_imported_for_a_conversation(tiny: Callable[[int], Path]) -> None:
    script = """
import sys
from npqwen.commands.cli import main
try:
    main(["chat", sys.argv[1], "-q", "--threads", "1", "--max-tokens", "1"])
finally:
    assert "prompt_toolkit" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, str(tiny(4))], input=b"x", capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
