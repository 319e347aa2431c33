"""Conversations in files: saving, continuing, and files that are not conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reciter import Reciter

import npqwen
from npqwen.chat.conversation import Conversation
from npqwen.errors import FormatError, OptionError, OutputError
from npqwen.generation.session import Session
from npqwen.model import Model

pytestmark = pytest.mark.filterwarnings("ignore::npqwen.errors.SamplingWarning")
GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with npqwen.load(tiny(4), threads=1) as loaded:
        yield loaded


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_saved_conversation_continues(model: Model, tmp_path: Path) -> None:
    talk = model.conversation("Be brief. 東京", thinking=False, **GREEDY)
    talk.send("What is 17 + 25?")
    talk.save(tmp_path / "talk.json")
    loaded = Conversation.load(model, tmp_path / "talk.json", thinking=False, **GREEDY)
    assert loaded.messages == talk.messages
    assert loaded.tokens == talk.tokens > 0
    model.prefixes.clear()
    mine = talk.send("What is 30 + 12?")
    model.prefixes.clear()
    other = loaded.send("What is 30 + 12?")
    assert other.text == mine.text == "30 + 12 = 42"
    assert other.usage.cached_tokens == mine.usage.cached_tokens > 0


@pytest.mark.parametrize("damage", ["absent", "cut", "another model's"])
def test_a_conversation_is_computed_again_if_its_cache_is_damaged(model: Model, tmp_path: Path, damage: str) -> None:
    talk = model.conversation(thinking=False, **GREEDY)
    talk.send("What is 17 + 25?")
    path, cache = tmp_path / "talk.json", tmp_path / "talk.json.npqwen-cache"
    talk.save(path)
    if damage == "absent":
        cache.unlink()
    elif damage == "cut":
        cache.write_bytes(cache.read_bytes()[:-1])
    else:
        cache.write_bytes(cache.read_bytes().replace(model.fingerprint.encode(), b"0" * len(model.fingerprint)))
    loaded = Conversation.load(model, path, thinking=False, **GREEDY)
    assert loaded.tokens == 0
    assert loaded.send("What is 30 + 12?").text == "30 + 12 = 42"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "it is not JSON"),
        ("[]", "not a saved conversation"),
        ("{}", "not a saved conversation"),
        ('{"format": "npqwen-conversation", "version": 9}', "version 9; this npqwen reads 1"),
        ('{"format": "npqwen-conversation", "version": 1}', "damaged"),
        ('{"format": "npqwen-conversation", "version": 1, "dropped": 5, "messages": []}', "damaged"),
        (
            '{"format": "npqwen-conversation", "version": 1, "dropped": 0, "messages": [{"role": "x"}]}',
            "damaged: .*role 'x'",
        ),
    ],
)
def test_a_file_that_is_not_a_conversation_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "talk.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FormatError, match=message):
        Conversation.load(Reciter(), path)


def test_a_path_that_cannot_be_written_is_named_and_keeps_its_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = model.conversation(thinking=False, messages=[user("a")])
    (tmp_path / "talk.json").mkdir()
    with pytest.raises(OutputError, match=r"talk\.json is a directory"):
        talk.save(tmp_path / "talk.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is a directory"):
        talk.save(".")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_thinking_is_saved_and_the_cache_is_optional(model: Model, tmp_path: Path) -> None:
    talk = model.conversation(**GREEDY)
    talk.thinking = False
    assert talk.send("What is 17 + 25?").reasoning == ""
    path = tmp_path / "talk.json"
    talk.save(path)
    cache = path.with_name("talk.json.npqwen-cache")
    assert cache.stat().st_size > talk.cache_bytes > 0
    talk.save(path, cache=False)
    assert not cache.exists()
    loaded = Conversation.load(model, path, **GREEDY)
    assert (loaded.thinking, loaded.tokens) == (False, 0)
    assert Conversation.load(model, path, thinking=True).thinking is True
    assert loaded.send("What is 30 + 12?").text == "30 + 12 = 42"


def test_wrong_options_are_not_reported_as_a_damaged_file(tmp_path: Path) -> None:
    talk = Reciter().conversation(messages=[user("a")])
    talk.save(tmp_path / "talk.json", cache=False)
    for options, message in (({"tools": "x"}, "tools is str"), ({"temprature": 1}, "unknown option 'temprature'")):
        with pytest.raises(OptionError, match=message):
            Conversation.load(talk.model, tmp_path / "talk.json", **options)


def test_a_file_that_cannot_be_read_is_not_reported_as_missing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        Conversation.load(Reciter(), tmp_path)
    (tmp_path / "talk.json").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="it is not JSON"):
        Conversation.load(Reciter(), tmp_path / "talk.json")


def test_a_sessions_file_of_a_similar_name_is_left_alone(model: Model, tmp_path: Path) -> None:
    session = Session(model)
    session.prefill(model.tokenizer.encode("A manual."))
    session.save(tmp_path / "manual.cache")
    mine = (tmp_path / "manual.cache").read_bytes()
    talk = model.conversation(thinking=False, messages=[user("a")])
    for cache in (True, False):
        talk.save(tmp_path / "manual", cache=cache)
        assert (tmp_path / "manual.cache").read_bytes() == mine


def test_saving_and_forking_close_an_answer_that_is_still_streaming(tmp_path: Path) -> None:
    ways: list[Callable[[Conversation], object]] = [
        lambda talk: talk.save(tmp_path / "talk.json", cache=False),
        lambda talk: talk.fork(),
    ]
    for leave in ways:
        talk = Reciter("One two three.").conversation(thinking=False)
        stream = talk.stream("Count.")
        next(stream)
        leave(talk)
        assert list(stream) == []
        assert talk.messages[-1]["content"] == stream.text
