"""`npqwen chat`: one answer, and a conversation in a real terminal."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    assert last == f"{tmp_path / 'cache' / 'history'} cannot be written: the history will lack what was entered now"


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
            command, stdin=slave, capture_output=True, encoding="utf-8", start_new_session=True, timeout=60
        )
    finally:
        os.close(slave)
        os.close(master)
    assert (done.stdout, done.stderr) == ("ended\n", "")


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


class PseudoTerminal:
    """`npqwen chat` with the tiny model in a terminal, each pass of it slowed down."""

    def __init__(self, model: Path, cache: Path, *arguments: str) -> None:
        import pty

        self.master, self.slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "XDG_CACHE_HOME": str(cache)}
        environment.pop("NO_COLOR", None)
        options = ["chat", str(model), "--threads", "1", "--temperature", "0", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, "0.05", *options],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True, env=environment,
        )  # fmt: skip
        self._seen = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """Everything written up to the text."""
        end = time.monotonic() + seconds
        while text not in self._seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} after {self._seen!r}"
            self._seen += os.read(self.master, 4096).decode("utf-8", "replace")
        at = self._seen.index(text) + len(text)
        before, self._seen = self._seen[:at], self._seen[at:]
        return before

    def prompt(self) -> str:
        """Everything up to the next prompt: it is ready when bracketed paste is on and the cursor visible."""
        return self.until("\x1b[?2004h") + self.until("\x1b[?25h")

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def settings(self) -> list[Any]:
        import termios

        return termios.tcgetattr(self.slave)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)


@pytest.fixture
def terminal(tiny: Callable[[int], Path], tmp_path: Path) -> Iterator[Callable[..., PseudoTerminal]]:
    """terminal(): starts a conversation in a terminal."""
    if sys.platform == "win32":
        pytest.skip("has no pty")
    opened: list[PseudoTerminal] = []

    def start(*arguments: str) -> PseudoTerminal:
        opened.append(PseudoTerminal(tiny(4), tmp_path, *arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_in_a_terminal(terminal: Callable[..., PseudoTerminal]) -> None:
    chat = terminal()
    chat.until("/help lists the commands")
    chat.prompt()
    chat.send(f"{SUM}\n")
    shown = chat.until("17 + 25 = 42")
    assert "\x1b[2m" in shown
    assert "thought for " in shown
    chat.until("context ")
    chat.prompt()
    chat.send("Define river.\n")
    chat.until("thinking...")
    chat.send("\x03")
    chat.until("stopped")
    chat.until("taken back")
    chat.prompt()
    chat.send("half a line")
    chat.until("half a line")
    chat.send("\x03")
    assert "again, or Ctrl-D" not in chat.prompt()
    chat.send("/nonsense\n")
    chat.until("unknown command /nonsense")
    chat.prompt()
    chat.send("\x03")
    chat.until("again, or Ctrl-D")
    chat.prompt()
    chat.send("/nothink\n")
    chat.until("thinking is off")
    chat.prompt()
    chat.send("\x1b[200~What is\n11 + 31?\x1b[201~\n")
    chat.until("tok/s")
    chat.prompt()
    chat.send("/exit\n")
    assert chat.process.wait(30) == 0


def test_keys_typed_during_an_answer_wait_for_the_prompt(terminal: Callable[..., PseudoTerminal]) -> None:
    chat = terminal("--no-think")
    chat.prompt()
    chat.send(f"{SUM}\n")
    chat.until("17")
    chat.send("/stats\nWhat is")
    assert "/stats" not in chat.until("tok/s")
    chat.until("all answers")
    chat.until("What is")
    chat.send(" 30 + 12?\n")
    chat.until("42")
    chat.prompt()
    chat.send("\x04")
    assert chat.process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGHUP", None), getattr(signal, "SIGQUIT", None)])
@pytest.mark.parametrize("answering", [False, True])
def test_a_signal_leaves_the_terminal_as_it_was(
    number: signal.Signals, answering: bool, terminal: Callable[..., PseudoTerminal]
) -> None:
    chat = terminal()
    before = chat.settings()
    chat.prompt()
    assert chat.settings() != before
    if answering:
        chat.send("Define river.\n")
        chat.until("thinking...")
        assert chat.settings() != before
    if sys.platform == "linux":  # SIGQUIT would leave a core file
        import resource

        resource.prlimit(chat.process.pid, resource.RLIMIT_CORE, (0, 0))
    chat.process.send_signal(number)
    assert chat.process.wait(30) == -number
    assert chat.settings() == before


def test_the_line_editor_is_only_imported_for_a_conversation(tiny: Callable[[int], Path]) -> None:
    script = """
import sys
from npqwen.commands.cli import main
try:
    main(["chat", sys.argv[1], "-q", "--threads", "1", "--max-tokens", "1"])
finally:
    assert "prompt_toolkit" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, str(tiny(4))], input=b"x", capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
