"""The slash commands for files: /save and /load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_terminal import chat_with
from reciter import Reciter

import npqwen
from npqwen.model import Model

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
SUM = "What is 17 + 25?"
Say = Callable[..., str]


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


def test_save_and_load(model: Model, tmp_path: Path, say: Say) -> None:
    chat = chat_with(model, temperature=0, thinking=False)
    assert "needs the name of a file" in say(chat, "/save")
    say(chat, SUM)
    path = tmp_path / "talk.json"
    assert re.search(r"saved .*talk\.json: 2 messages, \d+ kB\n", say(chat, f"/save {path}"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["talk.json", "talk.json.npqwen-cache"]
    assert json.loads(path.read_text())["thinking"] is False
    other = chat_with(model, temperature=0)
    assert f"loaded {path}: 2 messages; context 34 of 2,048 (2%)\n" in say(other, f"/load {path}")
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


def test_settings_and_the_models_name_are_saved_and_restored(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "talk.json"
    chat = chat_with(Reciter("a"), system="Be brief.", thinking=False)
    say(chat, "/set temperature 0.5", "/set stop END", "/set loop_guard off", "q", f"/save {path}")
    assert json.loads(path.read_text())["model"] == "m"
    other = chat_with(Reciter("b"), top_k=7)
    output = say(other, f"/load {path}")
    assert "held with" not in output
    assert other.settings.options == {"temperature": 0.5, "stop": ["END"], "loop_guard": False}
    assert other.conversation.system == "Be brief."
    assert other.conversation.thinking is False


def test_a_file_without_settings_leaves_those_of_the_chat(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "talk.json"
    Reciter("a").conversation(thinking=False).save(path, cache=False)
    chat = chat_with(Reciter(), top_k=7)
    assert "held with" not in say(chat, f"/load {path}")
    assert chat.settings.options == {"top_k": 7}


def test_another_model_and_settings_it_cannot_obey_are_told(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "talk.json"
    say(chat_with(Reciter("a")), "q", f"/save {path}")
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"model": "Qwen/Qwen3-4B", "options": {"top_k": 5, "top_p": 3}}))
    chat = chat_with(Reciter())
    output = say(chat, f"/load {path}")
    assert "this conversation was held with Qwen/Qwen3-4B; m continues it" in output
    assert "a saved setting is ignored: top_p is 3" in output
    path.write_text(json.dumps(saved | {"model": "x" * 1_000_000}))
    assert len(say(chat_with(Reciter()), f"/load {path}")) < 2000
    assert chat.settings.options == {"top_k": 5}


@pytest.mark.parametrize(
    "damage",
    [{"model": 3}, {"options": [1]}, {"unanswered": {}}, {"dropped": True}, {"messages": [{"role": "user"}]}],
)
def test_a_damaged_file_is_refused_and_the_conversation_stays(
    damage: dict[str, object], tmp_path: Path, say: Say
) -> None:
    path = tmp_path / "talk.json"
    chat = chat_with(Reciter("a"), top_k=7)
    say(chat, "q", f"/save {path}", "/set temperature 0.5")
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert "is damaged" in say(chat, f"/load {path}")
    assert len(chat.conversation.messages) == 2
    assert chat.settings.options == {"top_k": 7, "temperature": 0.5}


def test_another_conversations_file_is_overwritten_only_if_the_user_says_so(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "talk.json"
    say(chat_with(Reciter("a")), "q", f"/save {path}")
    before = path.read_text()
    chat = chat_with(Reciter("b"))
    say(chat, "r")
    assert "exists: a conversation of 2 messages; choose another name" in say(chat, f"/save {path}")
    asked, answers = [], [False, True]

    def confirm(question: str) -> bool:
        asked.append(question)
        return answers.pop(0)

    chat.confirm = confirm
    assert "not saved" in say(chat, f"/save {path}")
    assert path.read_text() == before
    assert f"saved {path}: 2 messages, " in say(chat, f"/save {path}")
    assert path.read_text() != before
    assert asked == [f"{path} exists: a conversation of 2 messages. Overwrite it?"] * 2
    say(chat, "/save", f"/save {path}")
    assert len(asked) == 2  # it is the conversation's own file by now


def test_a_directory_is_not_made_silently(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "none" / "talk.json"
    chat = chat_with(Reciter())
    assert f"the directory {path.parent} does not exist; create it" in say(chat, f"/save {path}")
    assert list(tmp_path.iterdir()) == []


def test_the_last_turns_are_shown_when_a_conversation_is_loaded(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "talk.json"
    answers = [f"answer {number} " + "word " * 300 for number in range(4)]
    chat = chat_with(Reciter(*answers), thinking=False)
    say(chat, *(f"question {number}" for number in range(4)), f"/save {path}")
    shown = say(chat_with(Reciter()), f"/load {path}")
    assert "... 4 earlier messages" in shown
    assert "question 1" not in shown
    assert "> question 2\nanswer 2 word" in shown
    assert shown.count("word") < 300
    assert shown.endswith("word ...\n")


@pytest.mark.parametrize(("text", "start"), [("长" * 300, "长" * 200), ("OK " + "长" * 300, "OK " + "长" * 197)])
def test_turns_without_spaces_are_shortened_to_their_beginning(
    text: str, start: str, tmp_path: Path, say: Say
) -> None:
    chat = chat_with(Reciter("好。"))
    say(chat, text, f"/save {tmp_path / 'talk.json'}")
    shown = say(chat_with(Reciter()), f"/load {tmp_path / 'talk.json'}")
    assert f"> {start} ..." in "".join(shown.split("\n"))


def test_a_question_without_an_answer_is_saved_too(tmp_path: Path, say: Say) -> None:
    path = tmp_path / "talk.json"
    chat = chat_with(Reciter("a"))

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    chat.model.prefill = interrupted  # type: ignore[assignment, method-assign]
    say(chat, "why?", f"/save {path}")
    other = chat_with(Reciter("Because."))
    assert "> why?\n(no answer yet; /retry asks the question again)\n" in say(other, f"/load {path}")
    assert "Because." in say(other, "/retry")
