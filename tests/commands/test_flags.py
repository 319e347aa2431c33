"""Flags as people type them: aliases, other programs' names, pairs that exclude each other, and what --help shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click
import pytest
from reciter import Reciter

from npqwen.checks import near_names, suggestion
from npqwen.commands import cli
from npqwen.commands.loading import Loading
from npqwen.errors import OptionError
from npqwen.generation.options import OPTIONS, check_options

Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line: status, stdout, stderr. No model can be opened."""

    def command(*args: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(list(args))
        return exit.value.code, *capsys.readouterr()

    monkeypatch.setattr("npqwen.hub.resolve", None)
    return command


@pytest.mark.parametrize(
    ("typed", "instead"),
    [
        # llama.cpp
        ("generate m x --temp9 0", "did you mean --temperature?"),
        ("generate m x --n-predict 5", "did you mean --max-tokens?"),
        ("generate m x -c 4096", "did you mean --context?"),
        ("chat m x --ctx-size 4096", "did you mean --context?"),
        ("chat m x --repeat-penalty 1.1", "did you mean --repetition-penalty?"),
        ("chat m x --reverse-prompt User:", "did you mean --stop?"),
        ("chat m x --reasoning-budget 0", "did you mean --thinking-budget?"),
        ("chat m --system-prompt brief", "did you mean --system?"),
        ("generate m -p x", "it is an argument without a flag: npqwen generate MODEL PROMPT;"),
        ("generate m -f text", "the text of a file is read from stdin: npqwen generate MODEL - < FILE;"),
        ("chat --model m", "it is an argument without a flag: npqwen chat MODEL [QUESTION];"),
        ("bench m --ctx-size 9", "did you mean --context?"),
        # mlx-lm, transformers, ollama
        ("generate m x --max-new-tokens 5", "did you mean --max-tokens?"),
        ("chat m x --max-kv-size 100", "did you mean --context?"),
        ("convert m --q-bits 4", "did you mean --bits?"),
        ("chat m x --nothink", "did you mean --no-think?"),
        ("chat m x --hidethinking", "did you mean --hide-thinking?"),
        ("chat m x -c 4096", "for a context of 4096 tokens, write --context 4096"),
        ("chat m -c 4096", "for a context of 4096 tokens, write --context 4096"),
        ("chat m x --revision main", "a revision is written after the model's name: Qwen/Qwen3-0.6B@main;"),
        ("convert m --revision main", "a revision is written after the model's name"),
        ("chat m x --verbose", "statistics are shown unless --quiet is given;"),
        # beginnings come before names that look alike
        ("chat m x --tempera 0", "did you mean --temperature?"),
        ("chat m x --pres 0", "did you mean --presence-penalty?"),
        ("chat m x --top 9", "did you mean --top-k or --top-p?"),
        ("chat m x --temprature 1", "did you mean --temperature?"),
        # options of another command
        ("generate m x --system y", "it is an option of npqwen chat; see npqwen generate --help"),
        ("generate m x --system-prompt y", "it is an option of npqwen chat;"),
        ("generate m x --think", "it is an option of npqwen chat;"),
        ("generate m x --no-think", "it is an option of npqwen chat;"),
        # text without quotes
        ("chat m 17 + 25", "the question has several words, so put it in quotes: npqwen chat m '17 + 25'; see npqwen"),
        ("chat m --no-think 17 + 25 -q", "so put it in quotes: npqwen chat m '17 + 25';"),
        ("generate m Once upon a time", "the prompt has several words, so put it in quotes: npqwen generate m 'Once "),
        ("info m x", "Got unexpected extra argument (x); see npqwen info --help"),
        # nothing near, and nothing that this command has
        ("chat m x --zzz", "No such option '--zzz'; see npqwen chat --help"),
        ("info m --n-predict 5", "No such option '--n-predict'; see npqwen info --help"),
        ("info m --prompt x", "No such option '--prompt'; see npqwen info --help"),
        # commands
        ("run m", "No such command 'run'; did you mean chat? See npqwen --help"),
        ("gen m x", "did you mean generate?"),
        ("convret m", "did you mean convert?"),
        # -s is llama.cpp's seed, and llm's system message
        ("chat m x -s Be-brief", "not a valid integer; the system message is --system; see npqwen chat --help"),
        ("generate m x -s Be-brief", "'Be-brief' is not a valid integer; see npqwen generate --help"),
    ],
)
def test_an_unknown_name_is_told_with_what_to_type_instead(typed: str, instead: str, run: Run) -> None:
    status, out, err = run(*typed.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert instead in err


@pytest.mark.parametrize(
    ("both", "message"),
    [
        (["--think", "--no-think"], "--think and --no-think exclude each other; give one of them"),
        (["--no-think", "q", "--think", "--think"], "--think and --no-think exclude each other"),
        (["--hide-thinking", "--show-thinking"], "--show-thinking and --hide-thinking exclude each other"),
        (["--no-loop-guard", "--loop-guard"], "--loop-guard and --no-loop-guard exclude each other"),
    ],
)
def test_a_switch_and_its_opposite_are_refused(both: list[str], message: str, run: Run) -> None:
    status, out, err = run("chat", "m", *both)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"npqwen: error: {message}")


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--temp 0.5 -n 7 -s 3", {"temperature": 0.5, "max_tokens": 7, "seed": 3}),
        ("--temperature 0.5 --max-tokens 7 --seed 3", {"temperature": 0.5, "max_tokens": 7, "seed": 3}),
        ("-n7 -s3 --temp=0", {"max_tokens": 7, "seed": 3, "temperature": 0}),
        ("--think", {}),
        ("--no-loop-guard --no-loop-guard", {"loop_guard": False}),
        ("--loop-guard", {"loop_guard": True}),
    ],
)
def test_aliases_set_the_option(flags: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def check(options: dict[str, Any]) -> None:
        given.update({name: value for name, value in options.items() if value is not None})
        raise OptionError("seen")

    for command in ("chat", "generate"):
        monkeypatch.setattr(f"npqwen.commands.{command}.check_options", check)
    with pytest.raises(SystemExit):
        cli.main(["chat", "m", "q", *flags.split()])
    assert given == options


def test_short_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    model = Reciter("Yes.")

    def opened(*arguments: Any, **rest: Any) -> Reciter:
        seen.append(arguments[:2])
        return model

    monkeypatch.setattr("npqwen.commands.generate.open_model", opened)
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", "m", "q", "-t", "3", "-n", "2"])
    assert exit.value.code == 0
    assert seen == [("m", Loading(threads=3))]


def test_suggestions_in_python() -> None:
    pairs = {"temp": "temperature", "max_new_tokens": "max_tokens", "repeat_penalty": "repetition_penalty"}
    for name, instead in pairs.items():
        with pytest.raises(OptionError, match=f"unknown option '{name}'; did you mean {instead}"):
            check_options({name: 1})
    assert suggestion("xyz", ["one", "two"]) == "choose from one, two"
    assert suggestion("t", ["two", "one", "three", "ten"]) == "did you mean two, three or ten?"
    assert near_names("", ["one"]) == []
    assert near_names("--Top-K", ["top_k"]) == ["top_k"]


def test_other_programs_names_are_nobodys_here() -> None:
    """A translation never hides an option's own name, and is one option's only."""
    elsewhere = [name for option in OPTIONS.values() for name in option.elsewhere]
    assert len(elsewhere) == len(set(elsewhere))
    assert not set(elsewhere) & set(OPTIONS)


# --- help ---


def test_help_cuts_nothing(run: Run) -> None:
    _, out, _ = run("--help")
    assert "…" not in out
    assert "..." not in out.replace("COMMAND [ARGS]...", "")
    text = " ".join(out.split())
    for name in cli.COMMANDS:
        assert re.search(rf"\b{name} [A-Z]", text)
    assert "info Describe MODEL: shapes, bits per weight, bytes of each part, memory needed, and the kernels" in text


@pytest.mark.parametrize("command", ["chat", "generate", "bench"])
def test_help_tells_every_default(command: str, run: Run) -> None:
    """But of flags that only add something."""
    text = " ".join(run(command, "--help")[1].split())
    options = [one for one in getattr(import_module(f"npqwen.commands.{command}"), command).params if one.opts]
    told = {one.name: "default: " in (one.help or "") for one in options if isinstance(one, click.Option)}
    added = {"system", "plain", "continues", "no_save", "stop", "logit_bias", "low_disk", "quiet", "as_json", "report"}
    added |= {"schema", "regex", "choice", "grammar"}
    assert {name for name, default in told.items() if not default} <= added
    for one in options:
        if isinstance(one, click.Option):
            assert " ".join((one.help or "").split()) in text
    assert "Bits per weight, if not converted yet; default: 4." in text
    if command != "bench":
        assert "0 always takes the likeliest token; default: the model's own." in text


def test_help_names_the_aliases(run: Run) -> None:
    text = run("chat", "--help")[1]
    for row in ("-n, --max-tokens N ", "--temperature, --temp T ", "-s, --seed N ", "-t, --threads N "):
        assert row in text
