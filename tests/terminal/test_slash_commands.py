"""The slash commands of a conversation in the terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_terminal import chat_with
from reciter import Reciter

import npqwen
from npqwen import ChatStream
from npqwen.errors import OptionError
from npqwen.model import Model
from npqwen.terminal.completions import completions
from npqwen.terminal.repl import handle
from npqwen.terminal.settings import Settings
from npqwen.terminal.slash_commands import COMMANDS, is_command
from npqwen.terminal.terminal_chat import TerminalChat

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
SUM = "What is 17 + 25?"


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """say(chat, line): its output, stdout and stderr."""

    def say(chat: TerminalChat, *lines: str) -> str:
        for line in lines:
            handle(chat, line)
        done = capsys.readouterr()
        return done.out + done.err

    return say


def test_help_names_every_command(say: Say) -> None:
    output = say(chat_with(Reciter()), "/help")
    assert all(f"/{name}" in output for name in COMMANDS)
    wanted = ["think", "nothink", "system", "set", "save", "load", "retry", "undo", "clear", "stats", "exit"]
    assert all(f"/{name} " in output for name in wanted)


def test_an_unknown_command_is_refused_with_the_nearest(say: Say) -> None:
    chat = chat_with(Reciter())
    assert "error: unknown command /retyr; did you mean /retry?" in say(chat, "/retyr")
    assert "/help lists the commands" in say(chat, "/zzzzzz")
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


def test_think_and_nothink_switch_and_with_a_question_only_once(say: Say) -> None:
    model = Reciter("<think>\n\n</think>\n\na", "b", "c")
    chat = chat_with(model)
    say(chat, "/nothink")
    assert chat.conversation.thinking is False
    say(chat, "/think why?", "so?", "/think")
    assert model.prompts[0].endswith("why?<|im_end|>\n<|im_start|>assistant\n")
    assert model.prompts[1].endswith("</think>\n\n")
    assert chat.conversation.thinking is True


@pytest.mark.parametrize(
    ("template", "line", "why"),
    [("instruct-2507", "/think", "does not think"), ("thinking-2507", "/no_think", "always thinks")],
)
def test_a_model_without_the_switch_refuses_it(template: str, line: str, why: str, say: Say) -> None:
    chat = chat_with(Reciter(template=template))
    assert why in say(chat, line)
    assert chat.conversation.thinking is None


def test_system_is_shown_set_and_taken_away(say: Say) -> None:
    model = Reciter("a", "b")
    chat = chat_with(model, system="Be brief.")
    assert "Be brief." in say(chat, "/system")
    say(chat, "/system Be\nlong.", "x")
    assert model.prompts[0].startswith("<|im_start|>system\nBe\nlong.<|im_end|>")
    say(chat, "/system -", "y")
    assert model.prompts[1].startswith("<|im_start|>user\nx")


def test_set_is_checked_as_the_api_does(say: Say) -> None:
    chat = chat_with(Reciter(), temperature=0.5)
    assert "unknown option 'temprature'; did you mean temperature?" in say(chat, "/set temprature 1")
    assert "must be a number from 0 to 1" in say(chat, "/set top_p 3")
    assert "top_k is 'x'; it must be a whole number, 0 or more" in say(chat, "/set top_k x")
    assert "needs a value" in say(chat, "/set top_k")
    assert "max_tokens is 0" in say(chat, "/set max_tokens 0")
    assert chat.settings.options == {"temperature": 0.5}
    say(chat, "/set top-k 7", "/set loop_guard off", "/set temperature default")
    assert chat.settings.options == {"top_k": 7, "loop_guard": False}
    table = say(chat, "/set")
    assert re.search(r"top_k +7 +set\n", table)
    assert re.search(r"temperature +0\.6\n", table)
    say(chat, "/nothink")
    assert re.search(r"temperature +0\.7\n", say(chat, "/set"))


def test_a_bias_on_a_token_that_is_not_there_is_refused_before_any_question() -> None:
    with pytest.raises(OptionError, match="logit_bias has token id 4128; the model's are 0 to 4127"):
        Settings(Reciter(), logit_bias={4128: 1.0})


def test_settings_reach_the_answer(say: Say) -> None:
    chat = chat_with(Reciter("one two three four", "a b c"))
    assert "cut off at max_tokens" in say(chat, "/set max_tokens 2", "x")
    assert "cut off" not in say(chat, "/set max_tokens default", "x")


def test_retry_undo_and_clear(say: Say) -> None:
    chat = chat_with(Reciter("first", "second", "third"), system="s", thinking=False)
    assert "has no user's message yet" in say(chat, "/retry")
    assert "has no user's message yet" in say(chat, "/undo")
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
    assert "the answer will be the same" in say(chat_with(Reciter("a", "b"), temperature=0), "q", "/retry")
    assert "the answer will be the same" not in say(chat_with(Reciter(), temperature=0), "/retry")


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


def test_save_and_load(model: Model, tmp_path: Path, say: Say) -> None:
    chat = chat_with(model, temperature=0, thinking=False)
    assert "needs the name of a file" in say(chat, "/save")
    say(chat, SUM)
    path = tmp_path / "talk.json"
    assert f"saved {path}: 2 messages, 0.2 MB" in say(chat, f"/save {path}")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["talk.json", "talk.json.npqwen-cache"]
    assert json.loads(path.read_text())["thinking"] is False
    other = chat_with(model, temperature=0)
    assert f"loaded {path}: 2 messages; context 34 of 2,048 (2 %)\n" in say(other, f"/load {path}")
    assert other.conversation.thinking is False
    assert other.conversation.messages == chat.conversation.messages
    assert other.conversation.tokens == chat.conversation.tokens > 0
    assert "30 + 12 = 42" in say(other, "What is 30 + 12?", "/save")
    assert len(json.loads(path.read_text())["messages"]) == 4


def test_save_spares_a_file_of_somebody_else_and_load_refuses_it(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    chat = chat_with(Reciter())
    assert "is not a saved conversation" in say(chat, f"/save {path}")
    assert "is not a saved conversation" in say(chat, f"/load {path}")
    assert path.read_text() == "mine"
    assert "does not exist" in say(chat, f"/load {tmp_path / 'none.json'}")


@pytest.mark.parametrize("name", ["~nobody-here/talk.json", "x" * 5000])
def test_a_place_where_no_file_can_be_is_an_error_of_one_line(
    name: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nobody-here").write_text("a file")
    chat = chat_with(model)
    for command in ("/save", "/load"):
        output = say(chat, f"{command} {name}")
        assert output.startswith("error: ")
        assert output.count("\n") == 1


def test_a_saved_state_of_thinking_that_this_model_lacks_is_reported(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "talk.json"
    saved = {"format": "npqwen-conversation", "version": 1, "dropped": 0, "thinking": False, "messages": []}
    path.write_text(json.dumps(saved))
    chat = chat_with(Reciter(template="thinking-2507"))
    assert "cannot be switched to it" in say(chat, f"/load {path}")
    assert chat.conversation.thinking is None
    path.write_text(json.dumps(saved | {"thinking": "no"}))
    assert "is damaged" in say(chat, f"/load {path}")


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


def test_tab_completes_commands_and_options() -> None:
    assert completions("/th") == ("/th", ["/think", "/thought"])
    assert completions("/set top_p") == ("top_p", ["top_p"])
    assert {"top_k", "top_p"} <= set(completions("/set top")[1])
    assert completions("/thought s") == ("s", ["show"])
    for line in ("st", "", "what is top", "/set top_k s", "/set /th", "/system t"):
        assert completions(line)[1] == []


def test_tab_completes_paths_also_with_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my talks").mkdir()
    for name in ("my talk.json", ".hidden", "my talks/a.json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert completions("/load my t") == ("my t", ["my talk.json", f"my talks{os.sep}"])
    assert completions("/save my talks/") == ("my talks/", ["my talks/a.json"])
    assert completions("/save ~/.h") == ("~/.h", ["~/.hidden"])
    assert completions("/load ") == ("", ["my talk.json", f"my talks{os.sep}"])
    assert completions("/load none/x") == ("none/x", [])
