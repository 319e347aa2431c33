"""`npqwen chat` in a real terminal: keys, signals, Ctrl-C at every moment, and continuing a conversation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pseudo_terminal import CHILD, PseudoTerminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no pty")
SUM = "What is 17 + 25?"
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
END_OF_PROMPT = "\x1b[?2004l"
"""Bracketed paste is switched off: the message is sent."""
Start = Callable[..., PseudoTerminal]


@pytest.fixture
def terminal(tiny: Callable[[int], Path], tmp_path: Path) -> Iterator[Start]:
    """terminal(): starts a conversation in a terminal, whose cache is tmp_path / "cache"."""
    opened: list[PseudoTerminal] = []

    def start(*arguments: str, seconds: float = 0.05, **environment: str) -> PseudoTerminal:
        opened.append(PseudoTerminal(tiny(4), tmp_path / "cache", *arguments, seconds=seconds, **environment))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_in_a_terminal(terminal: Start) -> None:
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
    chat.until("thinking... (Ctrl-C: answer now)")
    chat.until("user")
    chat.send("\x03")
    chat.until("ending the thinking...")
    chat.until(", ended early; /thought shows it")
    assert "stopped" not in chat.until("tok/s")
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


def test_keys_typed_during_an_answer_wait_for_the_prompt(terminal: Start) -> None:
    chat = terminal("--no-think")
    chat.prompt()
    chat.send(f"{SUM}\n")
    chat.until(END_OF_PROMPT)
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
    number: signal.Signals, answering: bool, terminal: Start
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


def test_keys_are_not_echoed_after_a_shell_stopped_and_continued_the_answer(terminal: Start) -> None:
    import termios

    chat = terminal()
    chat.prompt()
    chat.send("Define river.\n")
    chat.until("thinking...")
    chat.process.send_signal(signal.SIGSTOP)
    settings = chat.settings()
    assert not settings[3] & termios.ECHO
    settings[3] |= termios.ECHO
    termios.tcsetattr(chat.slave, termios.TCSANOW, settings)
    chat.process.send_signal(signal.SIGCONT)
    end = time.monotonic() + 30
    while chat.settings()[3] & termios.ECHO:
        assert time.monotonic() < end
        time.sleep(0.01)
    chat.prompt()


# --- Ctrl-C ---


def test_a_question_that_was_stopped_is_there_for_retry_and_arrow_up(terminal: Start) -> None:
    chat = terminal()
    chat.prompt()
    for again in ("/retry\n", f"{UP}{UP}\n"):
        chat.send("Define river.\n")
        chat.until("user")
        chat.send(CTRL_C)
        chat.until("ending the thinking...")
        chat.send(CTRL_C)
        chat.until("thinking interrupted after ")
        chat.until("stopped before the answer began; /retry asks the question again")
        chat.prompt()
        chat.send("/nothink\n")
        chat.until("thinking is off")
        chat.prompt()
        chat.send(again)
        chat.until("river (noun)")
        chat.until("tok/s")
        chat.prompt()
        chat.send("/think\n")
        chat.prompt()


@pytest.mark.parametrize("milliseconds", [0, 10, 100, 300, 1000])
def test_ctrl_c_at_any_moment_leaves_a_conversation_that_works(milliseconds: int, terminal: Start) -> None:
    chat = terminal(seconds=0.1)
    before = chat.settings()
    chat.prompt()
    chat.send("Define river.\n")
    chat.until(END_OF_PROMPT)
    time.sleep(milliseconds / 1000)
    chat.send(CTRL_C)
    time.sleep(0.01)
    chat.send(CTRL_C)
    chat.prompt()
    chat.send("/clear\n")
    chat.until("the conversation is cleared")
    chat.prompt()
    chat.send(f"/nothink {SUM}\n")
    chat.until("17 + 25 = 42")
    chat.prompt()
    chat.send(CTRL_D)
    assert chat.process.wait(30) == 0
    assert chat.settings() == before


@pytest.mark.parametrize("presses", [1, 2])
def test_one_answer_in_a_terminal_ends_its_thinking_first_and_then_the_command(presses: int, terminal: Start) -> None:
    chat = terminal("Define river.")
    chat.until("thinking... (Ctrl-C: answer now)")
    chat.until("user")
    chat.send(CTRL_C)
    chat.until("ending the thinking...")
    if presses == 2:
        chat.send(CTRL_C)
        chat.until("thinking interrupted after ")
        assert chat.process.wait(30) == 130
    else:
        chat.until(", ended early")
        chat.until("tok/s")
        assert chat.process.wait(30) == 0


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_one_answer_outside_of_a_terminal_ends_at_the_first_ctrl_c(
    stream: str, tiny: Callable[[int], Path], tmp_path: Path
) -> None:
    import pty

    master, slave = pty.openpty()
    streams = {"stdin": slave, "stdout": slave, "stderr": slave, stream: subprocess.DEVNULL}
    command = [sys.executable, "-c", CHILD.replace("fcntl.ioctl(0, termios.TIOCSCTTY, 0)", ""), "0.05", "chat"]
    process = subprocess.Popen([*command, str(tiny(4)), "Define river.", "--threads", "1"], **streams)  # type: ignore[call-overload]
    try:
        shown = b""
        while b"thinking" not in shown:
            shown += os.read(master, 4096)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)


# --- the last conversation ---


def kept(tmp_path: Path) -> list[Path]:
    """The conversations that were saved by themselves, and the history."""
    cache = tmp_path / "cache"
    return sorted([*(cache / "conversations").glob("*"), *cache.glob("history")])


def test_the_last_conversation_is_continued(terminal: Start, tmp_path: Path) -> None:
    chat = terminal("--continue", "--no-think", seconds=0)
    chat.until("there is no earlier conversation; this is a new one")
    chat.prompt()
    chat.send("/set top_k 7\n/system Be brief.\n")
    chat.until("the system message is set")
    chat.prompt()
    chat.send(f"{SUM}\n")
    chat.until("tok/s")
    chat.prompt()
    chat.send(CTRL_D)
    assert chat.process.wait(30) == 0
    (path, _) = kept(tmp_path)
    before = json.loads(path.read_text())
    assert [message["content"] for message in before["messages"]] == ["Be brief.", SUM, "17 + 25 = 42"]
    chat = terminal("-c", seconds=0)
    chat.until("continuing the last conversation: 2 messages")
    assert f"> {SUM}" in chat.until("17 + 25 = 42")
    chat.prompt()
    chat.send("/set\n")
    shown = chat.until("set\r\n")
    assert "temperature" in shown
    assert "top_k               7           set" in chat.until("top_p")
    chat.prompt()
    chat.send("What is 30 + 12?\n")
    chat.until("30 + 12 = 42")
    chat.until("tok/s")
    chat.prompt()
    chat.send(CTRL_D)
    assert chat.process.wait(30) == 0
    (again, _) = kept(tmp_path)
    assert again == path
    after = json.loads(path.read_text())
    assert len(after["messages"]) == 5
    assert after["thinking"] is False
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_killed_conversation_is_continued_with_its_question(number: int, terminal: Start, tmp_path: Path) -> None:
    chat = terminal("--no-think", seconds=0.1)
    chat.prompt()
    chat.send(f"{SUM}\n")
    chat.until("tok/s")
    chat.prompt()
    chat.send("Define river.\n")
    chat.until(END_OF_PROMPT)
    chat.until("river (")
    chat.process.send_signal(number)
    assert chat.process.wait(30) == -number
    chat = terminal("-c", seconds=0)
    chat.until("17 + 25 = 42")
    chat.until("(no answer yet; /retry asks the question again)")
    chat.prompt()
    chat.send("/retry\n")
    chat.until("river (noun)")
    chat.until("tok/s")
    chat.prompt()
    path, _ = kept(tmp_path)
    saved = json.loads(path.read_text())
    assert len(saved["messages"]) == 4
    assert "unanswered" not in saved


def test_one_more_question_to_the_last_conversation(terminal: Start, tmp_path: Path) -> None:
    chat = terminal(SUM, "--no-think", seconds=0)
    chat.until("tok/s")
    assert chat.process.wait(30) == 0
    chat = terminal("-c", "What is 30 + 12?", seconds=0)
    chat.until("continuing the last conversation: 2 messages")
    chat.until("30 + 12 = 42")
    assert chat.process.wait(30) == 0
    (path,) = kept(tmp_path)
    assert len(json.loads(path.read_text())["messages"]) == 4


def test_nothing_is_kept_on_demand(terminal: Start, tmp_path: Path) -> None:
    chat = terminal("--no-save", "--no-think", seconds=0)
    chat.prompt()
    chat.send(f"{SUM}\n")
    chat.until("tok/s")
    chat.prompt()
    chat.send(f"{UP}\n")
    chat.until("tok/s")
    chat.prompt()
    chat.send(CTRL_D)
    assert chat.process.wait(30) == 0
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written_loses_no_answer(terminal: Start, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "conversations").touch()
    chat = terminal("--no-think", seconds=0)
    chat.prompt()
    chat.send(f"{SUM}\n")
    chat.until("this conversation is not being saved:")
    chat.until("17 + 25 = 42")
    chat.prompt()
    chat.send(f"{SUM}\n")
    assert "not being saved" not in chat.until("tok/s")


def test_the_user_is_asked_before_a_file_is_overwritten(terminal: Start, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"format": "npqwen-conversation", "version": 1, "dropped": 0, "messages": []}))
    before = path.read_text()
    chat = terminal("--no-think", seconds=0)
    chat.prompt()
    for answer in ("n\n", "\n", CTRL_C, CTRL_D):
        chat.send(f"/save {path}\n")
        chat.until("a conversation of 0 messages. Overwrite it? [y/N]")
        chat.send(answer)
        chat.until("not saved")
        chat.prompt()
        assert path.read_text() == before
    chat.send(f"/save {path}\n")
    chat.until("[y/N]")
    chat.send("y\n")
    chat.until("0 messages, ")  # of which the file's path is on a row of its own
    chat.prompt()
    assert path.read_text() != before


def test_a_context_is_not_taken_for_a_question() -> None:
    command = [sys.executable, "-m", "npqwen", "chat", "none", "-c", "4096"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "npqwen: error: -c continues the last conversation; for a context of 4096 tokens, write --context 4096\n"
    )
