"""How clients call models."""

from __future__ import annotations

import pytest

from npqwen.errors import ModelNotFoundError, OptionError
from npqwen.server.model_names import ModelNames

HUB = ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Thinking-2507", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-Coder-30B-A3B-Instruct"]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        (None, HUB[0]),
        ("", HUB[0]),
        ("Qwen/Qwen3-0.6B", HUB[0]),
        ("qwen/qwen3-0.6b", HUB[0]),
        ("Qwen3-0.6B", HUB[0]),
        ("Qwen/Qwen3-0.6B:latest", HUB[0]),
        ("qwen3:0.6b", HUB[0]),
        ("qwen3:4b", HUB[1]),
        ("qwen3:4b-thinking-2507-q4_K_M", HUB[1]),
        ("qwen3:30b", HUB[2]),
        ("qwen3:30b-a3b", HUB[2]),
        ("qwen3-coder:30b", HUB[3]),
    ],
)
def test_spellings_of_other_programs_find_the_model(name: str | None, model: str) -> None:
    assert ModelNames(HUB, {}).find(name) == model


@pytest.mark.parametrize("name", ["gpt-4o", "qwen3", "qwen3:8b", "Qwen3", "qwen3-coder:480b", "Qwen3-0.6B-Base", "*"])
def test_another_name_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"there are Qwen/Qwen3-0\.6B, "):
        ModelNames(HUB, {}).find(name)
    with pytest.raises(ModelNotFoundError, match=r"there is only m$"):
        ModelNames(["m"], {}).find(name)


def test_a_name_that_could_be_two_models_is_refused() -> None:
    names = ModelNames(["a/m", "b/m", "Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Base"], {})
    for name in ("m", "qwen3:4b"):
        with pytest.raises(ModelNotFoundError):
            names.find(name)
    assert names.find("b/m") == "b/m"
    assert names.find("qwen3-4b") == "Qwen/Qwen3-4B"


def test_aliases_exact_before_patterns() -> None:
    aliases = {"gpt-4o": "Qwen/Qwen3-0.6B", "claude-*": "qwen3:30b", "claude-haiku-*": "Qwen3-0.6B"}
    names = ModelNames(HUB, aliases)
    assert names.find("GPT-4o") == HUB[0]
    assert names.find("claude-sonnet-4-5") == HUB[2]
    assert names.find("claude-haiku-4-5") == HUB[2]  # the first pattern that matches
    with pytest.raises(ModelNotFoundError, match=r"gpt-4o$"):
        names.find("gpt-5")
    everything = ModelNames(["m", "n"], {"*": "m", "b": "n"})
    assert [everything.find(name) for name in ("b", "n", "anything")] == ["n", "n", "m"]


def test_the_aliases_that_are_names_are_listed_once() -> None:
    aliases = {"gpt-4o": "m", "GPT-4o": "m", "gpt-*": "m", "M": "m", "m:sql": "m", "b": "m"}
    assert ModelNames(["m"], aliases, {"m:sql": "sql"}).aliases == ["GPT-4o", "b"]


def test_an_alias_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="stands for 'x', which is not served"):
        ModelNames(HUB, {"a": "x"})
