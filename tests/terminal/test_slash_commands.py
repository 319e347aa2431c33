"""The slash commands of a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_terminal import chat_with
from reciter import Reciter

import npqwen
from npqwen import ChatStream
from npqwen.model import Model
from npqwen.terminal.slash_commands import COMMANDS, is_command

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
SUM = "What is 17 + 25?"
Say = Callable[..., str]


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


def test_help_names_every_command(say: Say) -> None:
    output = say(chat_with(Reciter()), "/help")
    assert all(f"/{name}" in output for name in COMMANDS)
    wanted = ["think", "nothink", "system", "set", "save", "load", "retry", "undo", "clear", "stats", "exit"]
    assert all(f"/{name} " in output for name in wanted)


def test_an_unknown_command_is_refused_with_the_nearest(say: Say) -> None:
    chat = chat_with(Reciter())
    assert "error: unknown command /retyr; did you mean /retry?" in say(chat, "/retyr")
    assert "did you mean /retry?" in say(chat, "/ret")
    assert "did you mean /save?" in say(chat, "/sa")
    assert "did you mean /exit?" in say(chat, "/qui")
    assert "/help lists the commands" in say(chat, "/zzzzzz")
    assert "leave the chat and type npqwen list" in say(chat, "/list")
    assert "takes no arguments" in say(chat, "/undo 3")
    assert chat.conversation.messages == []


def test_a_command_may_be_written_in_other_ways(say: Say) -> None:
    for line in ("/no-think", "/no_think", "/NoThink"):
        chat = chat_with(Reciter())
        say(chat, line)
        assert chat.conversation.thinking is False
    for line in ("/?", "/help?", "/HELP"):
        assert "/retry " in say(chat_with(Reciter()), line)


@pytest.mark.parametrize("said", ["/usr/bin is what?", " /help", "// a\n/ b", "/nothing\nelse", "1/2?"])
def test_what_only_begins_like_a_command_is_said_to_the_model(said: str, say: Say) -> None:
    assert not is_command(said)
    chat = chat_with(Reciter("Yes."))
    say(chat, said)
    assert chat.conversation.messages[0]["content"] == said


def test_retry_undo_and_clear(say: Say) -> None:
    chat = chat_with(Reciter("first", "second", "third"), system="s", thinking=False)
    assert "has no user message yet" in say(chat, "/retry")
    assert "has no user message yet" in say(chat, "/undo")
    say(chat, "q", "/retry")
    assert [message["content"] for message in chat.conversation.messages] == ["s", "q", "second"]
    assert "taken back: q" in say(chat, "/undo")
    assert len(chat.conversation.messages) == 1
    say(chat, "q")
    assert "the system message stays" in say(chat, "/clear")
    assert len(chat.conversation.messages) == 1


def test_retry_with_a_seed_draws_anew(monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    chat = chat_with(Reciter("a", "b", "c"), seed=5)
    say(chat, "q")
    seeds = []
    retry = chat.conversation.stream_retry

    def stream_retry(**options: Any) -> ChatStream:
        seeds.append(options["seed"])
        return retry(**options)

    monkeypatch.setattr(chat.conversation, "stream_retry", stream_retry)
    say(chat, "/retry", "/retry")
    assert seeds == [6, 7]


def test_retry_warns_if_neither_answer_is_drawn_at_random(say: Say) -> None:
    assert "the answer will be the same" in say(chat_with(Reciter("a", "b"), temperature=0), "q", "/retry")
    assert "the answer will be the same" not in say(chat_with(Reciter(), temperature=0), "/retry")
    chat = chat_with(Reciter("a", "b", "c"), temperature=0.7)
    assert "the answer will be the same" not in say(chat, "q", "/set temperature 0", "/retry")
    assert "the answer will be the same" in say(chat, "/retry")


def test_retry_asks_as_the_question_was_asked(say: Say) -> None:
    model = Reciter("a", "b", "c", "d")
    chat = chat_with(model)
    say(chat, "/nothink why?", f"/think {'why? ' * 3000}", "/undo", "/retry")
    assert model.prompts[1].endswith("why?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    say(chat, "/think", "/retry", "so?")
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in model.prompts[2:])


def test_retry_that_is_stopped_before_its_text_leaves_the_answer_there_was(say: Say) -> None:
    model = Reciter("first", "second", "third")
    chat = chat_with(model)
    say(chat, "q")

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    model.forward = interrupted  # type: ignore[assignment, method-assign]
    assert "stopped before the answer began; the previous answer is kept" in say(chat, "/retry")
    assert [message["content"] for message in chat.conversation.messages] == ["q", "first"]
    assert "stopped before the answer began; /retry asks the question again" in say(chat, "r")


def test_stats(model: Model, say: Say) -> None:
    chat = chat_with(model, temperature=0, thinking=False)
    say(chat, SUM, "What is 30 + 12?")
    output = say(chat, "/stats")
    assert "4 messages" in output
    assert f"of {model.context:,}" in output
    assert "all answers   2:" in output


def test_the_context_in_use_is_told_when_it_is_known(model: Model, tmp_path: Path, say: Say) -> None:
    path = tmp_path / "talk.json"
    used = f" of {model.context:,}"
    chat = chat_with(model, temperature=0, thinking=False)
    assert used not in say(chat, "/stats")
    assert used in say(chat, SUM, f"/save {path}")
    assert used in say(chat, f"/load {path}", "/stats")
    assert used not in say(chat, "/clear", "/stats")
    (tmp_path / "talk.json.npqwen-cache").unlink()
    assert used not in say(chat, f"/load {path}", "/stats")
    assert used in say(chat, "What is 30 + 12?")
    assert used in say(chat, "/stats")


def test_exit_leaves(say: Say) -> None:
    for line in ("/exit", "/quit"):
        chat = chat_with(Reciter())
        say(chat, line)
        assert chat.finished


@pytest.mark.parametrize(
    ("word", "hint"), [("exit", "/exit or press Ctrl-D"), ("Quit ", "/exit"), ("exit()", "/exit"), ("help", "/help")]
)
def test_a_word_for_this_program_is_not_sent_to_the_model(word: str, hint: str, say: Say) -> None:
    chat = chat_with(Reciter("It is a word."))
    assert hint in say(chat, word)
    assert not chat.finished
    assert chat.conversation.messages == []
    say(chat, f" {word}")
    assert chat.conversation.messages[0]["content"] == f" {word}"


def test_help_for_one_command(say: Say) -> None:
    for line in ("/help set", "/? /set", "/help SET"):
        output = say(chat_with(Reciter()), line)
        assert output.startswith("  /set [NAME VALUE] ")
        assert output.count("\n") == 1
    assert "there is no command /sett" in say(chat_with(Reciter()), "/help sett")
