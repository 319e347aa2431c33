"""`--schema`, `--regex`, `--choice` and `--grammar` of `npqwen generate` and `npqwen chat`, and `/set` in a chat."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_terminal import chat_with
from reciter import Reciter

Run = Callable[..., tuple[str, str]]
SCHEMA = '{"type": "object", "properties": {"sum": {"type": "integer", "maximum": 99}}, "required": ["sum"]}'


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """model(m): the one that the commands open."""

    def use(model: Any) -> None:
        for command in ("chat", "generate"):
            monkeypatch.setattr(f"npqwen.commands.{command}.open_model", lambda *_, **__: model)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))

    return use


def test_an_answer_is_json_by_a_file_or_by_text(run: Run, model: Callable[[Any], None], tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(SCHEMA, encoding="utf-8")
    for schema in (str(tmp_path / "s.json"), SCHEMA):
        model(Reciter("<think>\nHm.\n</think>\n\n42"))
        out, err = run("chat", "m", "What?", "--schema", schema)
        assert out.endswith("}\n")
        assert json.loads(out)["sum"] <= 99
        assert "tok/s" in err
    model(Reciter('{"a": {"b": [1, "x"]}}'))
    assert run("generate", "m", "x", "--schema", "json")[0] == '{"a": {"b": [1, "x"]}}\n'


def test_texts_by_regex_choices_and_grammar(run: Run, model: Callable[[Any], None], tmp_path: Path) -> None:
    model(Reciter("12"))
    assert re.fullmatch(r"\d\d-\d\n", run("generate", "m", "x", "--regex", r"\d\d-\d")[0])
    model(Reciter("no"))
    assert run("generate", "m", "x", "--choice", "yes", "--choice", "no way")[0] == "no way\n"
    (tmp_path / "g").write_text('root ::= "It is " [0-9] "."', encoding="utf-8")
    model(Reciter("It is 4"))
    assert run("chat", "m", "x", "--no-think", "--grammar", str(tmp_path / "g"))[0] == "It is 4.\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--schema", "no.json"), "schema: no.json cannot be read: No such file or directory"),
        (("--schema", "{"), "schema '{' is not JSON"),
        (("--schema", '{"type": "objekt"}'), "schema cannot be used: Invalid type: objekt"),
        (("--grammar", "no.gbnf"), "grammar: no.gbnf cannot be read: No such file or directory"),
        (("--regex", "(a"), "regex cannot be used: unclosed group"),
        (("--choice", ""), "choice is ['']; it must be a sequence of strings that are not empty"),
        (("--choice", "a", "--regex", "a"), "regex and choice exclude each other; give one of them"),
        (("--json-schema", "a"), "did you mean --schema?"),
        (("--grammar-file", "a"), "did you mean --grammar?"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_mistakes_are_told_before_the_model_is_opened(
    command: str, args: tuple[str, ...], message: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("npqwen.hub.resolve", None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    out, err = run(command, "m", "x", *args, status=2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_structures_are_set_and_kept_in_a_conversation(say: Callable[..., str], tmp_path: Path) -> None:
    model = Reciter("<think>\nHm.\n</think>\n\n42", "b", "Words.")
    chat = chat_with(model)
    assert f"schema is {json.dumps(json.loads(SCHEMA))[:40]}" in say(chat, f"/set schema {SCHEMA}")
    shown = say(chat, "What?")
    assert '{"sum": ' in shown
    json.dumps(chat.settings.plain)
    assert "schema and regex exclude each other; give one of them" in say(chat, "/set regex a+")
    say(chat, "/set schema default", "/set regex b{3}")
    assert "bbb" in say(chat, "/nothink", "What?")
    (tmp_path / "g").write_text('root ::= "a"\n', encoding="utf-8")
    assert 'grammar is root ::= "a"' in say(chat, "/set regex default", f"/set grammar {tmp_path / 'g'}")
    assert "unknown option 'choice'" in say(chat, "/set choice a")
    assert "schema needs a value: the name of a file" in say(chat, "/set schema")


def test_what_can_be_saved_is_restored(say: Callable[..., str], tmp_path: Path) -> None:
    chat = chat_with(Reciter("a"))
    say(chat, f"/set schema {SCHEMA}", "Hi", f"/save {tmp_path / 'talk.json'}")
    other = chat_with(Reciter("a"))
    say(other, f"/load {tmp_path / 'talk.json'}")
    assert other.settings.options["schema"] == json.loads(SCHEMA)
