"""Conversations that are saved by themselves: whose they are, how many, and what damages them."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from pathlib import Path

import pytest
from fake_terminal import chat_with
from reciter import Reciter

import npqwen.terminal.autosave as autosave_module
from npqwen.chat.saved_conversation import SavedConversation
from npqwen.errors import OutputError
from npqwen.terminal.autosave import MAX_FILES, Autosave
from npqwen.terminal.repl import handle
from npqwen.terminal.terminal_chat import TerminalChat

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")


def saved(text: str, model: str = "m") -> SavedConversation:
    return SavedConversation([{"role": "user", "content": text}], model=model)


def last(directory: Path, model: str = "m") -> str | None:
    """The text of the conversation that --continue would find."""
    found, _ = Autosave(directory).last(model)
    return None if found is None else str(found[0].messages[-1]["content"])


def older(directory: Path, seconds: int) -> None:
    """Make all files older: the clock of some file systems is coarse."""
    for path in directory.glob("*.json"):
        then = path.stat().st_mtime_ns - seconds * 10**9
        os.utime(path, ns=(then, then))


def chat_saved_in(directory: Path, *texts: str) -> TerminalChat:
    chat = chat_with(Reciter(*texts), thinking=False)
    chat.autosave = Autosave(directory)
    return chat


def test_only_the_user_can_read_what_is_saved(tmp_path: Path) -> None:
    directory = tmp_path / "cache" / "conversations"
    Autosave(directory).save(saved("secret"))
    (path,) = directory.iterdir()
    if sys.platform != "win32":
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_newest_conversation_with_the_model_is_found_or_else_the_newest(tmp_path: Path) -> None:
    assert last(tmp_path) is None
    for text, model in (("one", "a"), ("two", "a"), ("three", "b")):
        Autosave(tmp_path).save(saved(text, model))
        older(tmp_path, 10)
    assert (last(tmp_path, "a"), last(tmp_path, "b"), last(tmp_path, "c")) == ("two", "three", "three")


def test_a_conversation_replaces_its_own_file_also_when_it_is_continued(tmp_path: Path) -> None:
    first = Autosave(tmp_path)
    first.save(saved("one"))
    first.save(saved("one more"))
    again = Autosave(tmp_path)
    again.last("m")
    again.save(saved("one more and more"))
    assert last(tmp_path) == "one more and more"
    assert len(list(tmp_path.iterdir())) == 1


def test_two_terminals_that_continue_the_same_conversation_do_not_overwrite_each_other(tmp_path: Path) -> None:
    Autosave(tmp_path).save(saved("begin"))
    first, second = Autosave(tmp_path), Autosave(tmp_path)
    first.last("m")
    second.last("m")
    first.save(saved("begin first"))
    second.save(saved("begin then second"))
    first.save(saved("begin first first"))
    second.save(saved("begin then second second"))
    texts = {SavedConversation.read(path).messages[0]["content"] for path in tmp_path.iterdir()}
    assert texts == {"begin first first", "begin then second second"}


def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    autosave = Autosave(tmp_path)
    autosave.save(saved("one"))
    (path,) = tmp_path.iterdir()
    path.write_text("")
    autosave.save(saved("one"))
    assert path.read_text() == ""


def test_old_conversations_and_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    leftover = tmp_path / ".20200101-000000-abcdef.json.partial-0123"
    leftover.touch()
    os.utime(leftover, (0, 0))
    for number in range(MAX_FILES + 3):
        Autosave(tmp_path).save(saved(str(number)))
        older(tmp_path, 10)
    assert len(list(tmp_path.glob("*.json"))) == MAX_FILES
    assert not leftover.exists()
    assert (tmp_path / "notes.txt").exists()
    assert last(tmp_path) == str(MAX_FILES + 2)


@pytest.mark.parametrize("damage", ["", "{", '{"format": "npqwen-conversation", "version": 1, "dropped": 0}'])
def test_a_damaged_file_is_named_and_an_older_one_found(tmp_path: Path, damage: str) -> None:
    Autosave(tmp_path).save(saved("old"))
    older(tmp_path, 10)
    path = tmp_path / f"{time.strftime('%Y%m%d-%H%M%S')}-abcdef.json"
    path.write_text(damage)
    found, errors = Autosave(tmp_path).last("m")
    assert found is not None
    assert found[0].messages[0]["content"] == "old"
    assert len(errors) == 1
    assert errors[0].startswith(f"{path} is ")
    assert path.read_text() == damage


def test_a_conversation_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autosave_module, "MAX_BYTES", 1000)
    with pytest.raises(OutputError, match="larger than 0 MB; /save FILE saves it"):
        Autosave(tmp_path).save(saved("x" * 1000))
    assert list(tmp_path.iterdir()) == []


# --- a conversation that is saved so ---


def test_a_conversation_is_saved_question_by_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_saved_in(tmp_path, "first", "second")
    handle(chat, "/set temperature 0.5")
    assert list(tmp_path.iterdir()) == []
    handle(chat, "q")
    handle(chat, "r")
    found, _ = Autosave(tmp_path).last("m")
    assert found is not None
    conversation, path = found
    other = chat_saved_in(tmp_path, "third")
    other.restore(conversation, path)
    assert [message["content"] for message in other.conversation.messages] == ["q", "first", "r", "second"]
    assert other.conversation.thinking is False
    assert other.settings.options == {"temperature": 0.5}


def test_the_question_is_saved_before_it_is_answered(tmp_path: Path) -> None:
    chat = chat_saved_in(tmp_path)
    seen = []

    def look(*args: object, **options: object) -> None:
        found, _ = Autosave(tmp_path).last("m")
        assert found is not None
        seen.append(found[0].unanswered)
        raise KeyboardInterrupt

    chat.model.prefill = look  # type: ignore[assignment, method-assign]
    handle(chat, "why?")
    assert seen == ["why?"]
    found, _ = Autosave(tmp_path).last("m")
    assert found is not None
    other = chat_saved_in(tmp_path, "Because.")
    other.restore(*found)
    handle(other, "/retry")
    assert [message["content"] for message in other.conversation.messages] == ["why?", "Because."]


def test_clear_removes_the_saved_conversation_and_load_begins_another(tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    chat = chat_saved_in(directory, "first", "second")
    handle(chat, "q")
    handle(chat, f"/save {tmp_path / 'talk.json'}")
    handle(chat, "/clear")
    assert list(directory.iterdir()) == []
    handle(chat, "r")
    handle(chat, f"/load {tmp_path / 'talk.json'}")
    assert len(list(directory.iterdir())) == 2


def test_undoing_everything_leaves_nothing_to_continue(tmp_path: Path) -> None:
    chat = chat_saved_in(tmp_path, "first")
    handle(chat, "q")
    handle(chat, "/undo")
    assert last(tmp_path) is None


def test_a_full_disk_is_told_once_and_no_answer_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_saved_in(tmp_path, "first", "second", "third")
    handle(chat, "p")
    sync = os.fsync
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    handle(chat, "q")
    output = capsys.readouterr()
    assert output.out == "first\nsecond\n"
    assert output.err.count("this conversation is not being saved: ") == 1
    assert "no room is left on the disk" in output.err
    assert [message["content"] for message in chat.conversation.messages] == ["p", "first", "q", "second"]
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "fsync", sync)
    handle(chat, "r")
    assert "not being saved" not in capsys.readouterr().err
    assert last(tmp_path) == "third"


def test_a_directory_that_cannot_be_made_is_told_and_the_chat_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").touch()
    chat = chat_saved_in(tmp_path / "cache" / "conversations", "Yes.")
    handle(chat, "q")
    output = capsys.readouterr()
    assert output.out == "Yes.\n"
    assert output.err.count("this conversation is not being saved: ") == 1


def test_nothing_is_kept_while_that_is_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from npqwen.terminal.history import History

    chat = chat_saved_in(tmp_path / "saved", "a", "b")
    chat.history = History(tmp_path / "history")
    handle(chat, "/set nohistory")
    handle(chat, "q")
    chat.history.add("q")
    assert list(tmp_path.iterdir()) == []
    handle(chat, "/set history")
    chat.history.add("r")
    assert last(tmp_path / "saved") == "a"
    assert History(tmp_path / "history").entries() == ["r"]
    chat.autosave = None
    handle(chat, "/set nohistory")
    assert "started with --no-save" in capsys.readouterr().err
