"""Ctrl-C during an answer: it ends the thinking, then the answer, and loses neither text nor question."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
from fake_terminal import chat_with, on_screen
from reciter import Reciter

from npqwen.errors import FormatError
from npqwen.generation.thinking import ENDING
from npqwen.terminal.repl import handle
from npqwen.terminal.terminal_chat import TerminalChat

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
WORDS = " ".join(["so"] * 40)
LONG = f"<think>\n{WORDS}\n</think>\n\nIt is so."


def press(chat: TerminalChat, when: Callable[[int], bool]) -> list[int]:
    """Press Ctrl-C during those passes for which `when(number)` is true; 0 is the prompt's. Returns the numbers."""
    pressed: list[int] = []
    number = -1
    forward = chat.model.forward

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        if when(number):
            pressed.append(number)
            signal.raise_signal(signal.SIGINT)
        return forward(*arguments, **options)

    chat.model.forward = interrupted  # type: ignore[method-assign]
    return pressed


def answer(chat: TerminalChat) -> dict[str, Any]:
    return chat.conversation.messages[-1]


def test_the_first_ctrl_c_ends_the_thinking_and_the_answer_follows(capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_with(Reciter(LONG))
    press(chat, lambda number: number == 10)
    handle(chat, "q")
    assert answer(chat)["reasoning_content"].strip().endswith(ENDING.partition("</think>")[0].strip())
    assert answer(chat)["reasoning_content"].count("so") < 20
    assert chat.last_usage is not None
    assert chat.unanswered is None
    assert "stopped" not in capsys.readouterr().err


def test_the_next_ctrl_c_stops_the_answer_whose_text_stays(capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_with(Reciter("<think>\nso\n</think>\n\n" + 3 * WORDS))
    press(chat, lambda number: number in (2, 20))
    handle(chat, "q")
    text = answer(chat)["content"]
    assert 0 < text.count("so") < 40
    output = capsys.readouterr()
    assert output.out.rstrip("\n") == text
    assert "stopped, " in output.err
    assert chat.unanswered is None


def test_twice_in_the_thinking_stops_and_the_question_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_with(Reciter(LONG, LONG))
    pressed = press(chat, lambda number: number in (10, 11))
    handle(chat, "why?")
    assert pressed == [10, 11]
    assert chat.conversation.messages == []
    assert capsys.readouterr().err == "stopped before the answer began; /retry asks the question again\n"
    handle(chat, "/retry")
    assert [message["content"] for message in chat.conversation.messages] == ["why?", "It is so."]


def test_ctrl_c_while_the_prompt_is_read_stops_also_if_the_prompt_opens_the_thinking() -> None:
    for template in ("hybrid", "thinking-2507"):
        chat = chat_with(Reciter(LONG, template=template))
        press(chat, lambda number: number == 0)
        handle(chat, "q")
        assert chat.conversation.messages == []
        assert chat.unanswered is not None
        assert chat.unanswered.text == "q"


def test_a_model_that_always_thinks_can_be_interrupted_too() -> None:
    chat = chat_with(Reciter(f"{WORDS}\n</think>\n\nIt is so.", template="thinking-2507"))
    press(chat, lambda number: number == 10)
    handle(chat, "q")
    assert ENDING.split()[0] in answer(chat)["reasoning_content"]


@pytest.mark.parametrize("moment", range(24))
def test_whenever_it_is_pressed_question_and_text_are_kept(moment: int) -> None:
    """From one moment on in every pass: more than once must not disturb what the first one has begun."""
    chat = chat_with(Reciter("<think>\nso so so\n</think>\n\nIt is so.", "Yes."))
    before = signal.getsignal(signal.SIGINT)
    pressed = press(chat, lambda number: moment <= number)
    handle(chat, "q")
    chat.model.forward = Reciter.forward.__get__(chat.model)  # type: ignore[method-assign]
    assert signal.getsignal(signal.SIGINT) is before
    assert len(pressed) <= 2
    messages = chat.conversation.messages
    if messages:
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert chat.unanswered is None
    else:
        assert chat.unanswered is not None
        handle(chat, "/retry")
        assert [message["content"] for message in chat.conversation.messages] == ["q", "Yes."]


def test_after_an_error_the_question_is_kept() -> None:
    chat = chat_with(Reciter("Yes."))
    prefill = chat.model.prefill

    def failing(*arguments: object, **options: object) -> None:
        raise FormatError("the weights are damaged")

    chat.model.prefill = failing  # type: ignore[assignment, method-assign]
    handle(chat, "/nothink why?")
    assert chat.conversation.messages == []
    chat.model.prefill = prefill  # type: ignore[method-assign]
    handle(chat, "/retry")
    assert [message["content"] for message in chat.conversation.messages] == ["why?", "Yes."]
    assert chat.question_options == {"thinking": False}


def test_undo_and_clear_forget_a_question_without_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("/undo", "/clear"):
        chat = chat_with(Reciter("Yes.", "No."))
        handle(chat, "first")
        press(chat, lambda number: number == 0)
        handle(chat, "second")
        handle(chat, command)
        assert chat.unanswered is None
        assert len(chat.conversation.messages) == (2 if command == "/undo" else 0)
    assert "taken back: second" in capsys.readouterr().err


def test_the_screen_tells_the_key_while_it_has_this_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    chat = chat_with(Reciter(LONG, LONG))
    press(chat, lambda number: number == 10)
    handle(chat, "q")
    shown = screen.getvalue()
    assert shown.index("thinking... (Ctrl-C: answer now)") < shown.index("ending the thinking...")
    rows = screen.rows()
    assert rows[0].startswith("thought for ")
    assert rows[0].endswith(", ended early; /thought shows it")
    assert not any("Ctrl-C" in row or "ending" in row for row in rows)
    chat.view.mode = "show"
    start = len(screen.getvalue())
    handle(chat, "r")
    assert "thinking... (Ctrl-C: answer now)" in screen.getvalue()[start:]
    monkeypatch.setenv("COLUMNS", "24")
    start = len(screen.getvalue())
    handle(chat_with(Reciter(LONG)), "q")
    assert "thinking..." in screen.getvalue()[start:]
    assert "Ctrl-C" not in screen.getvalue()[start:]


def test_an_interrupted_thinking_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    chat = chat_with(Reciter(LONG))
    press(chat, lambda number: number in (10, 11))
    handle(chat, "q")
    assert screen.rows()[0].startswith("thinking interrupted after ")
    assert screen.rows()[1] == "stopped before the answer began; /retry asks the question again"


def test_statistics_can_be_switched_off_and_on(capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_with(Reciter("a", "b"), thinking=False)
    handle(chat, "/set quiet")
    handle(chat, "q")
    assert "first token after" not in capsys.readouterr().err
    handle(chat, "/set verbose")
    handle(chat, "q")
    assert "first token after" in capsys.readouterr().err
