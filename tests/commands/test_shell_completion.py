"""What Tab completes: the names and places of models, files, options; and the scripts in the real shells."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from converted import small_model

from npqwen.commands.cli import COMMANDS, cli

Run = Callable[..., tuple[str, str]]
NO_FILES = {
    "question", "prompt", "query", "system", "stop", "regex", "choice", "instruction", "host", "api_keys", "origins",
    "hosts", "topic",
}  # fmt: skip
"""Parameters that are plain texts, or complete by a function of their own."""


def complete(*words: str) -> list[str]:
    """What Tab offers after `npqwen WORDS`, of which the last one is begun; FILES where the shell completes a path."""
    found = ShellComplete(cli, {}, "npqwen", "_NPQWEN_COMPLETE").get_completions([*words[:-1]], words[-1])
    return ["FILES" if one.type == "file" else one.value for one in found]


def parameters() -> Iterator[tuple[str, click.Parameter]]:
    ctx = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(ctx, name)
        assert command is not None
        below = command.commands.values() if isinstance(command, click.Group) else ()
        for one in (command, *below):
            yield from ((name, parameter) for parameter in one.params)


@pytest.fixture
def shelf(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with models, a cache with one conversion, and huggingface_hub's cache with two downloads."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    for name, kind in (("Qwen--Qwen3-4B", "qwen3"), ("google--gemma", "gemma")):
        snapshot = tmp_path / "hf" / f"models--{name}" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
    kept = small_model(cache / "hub/Qwen--Qwen3-0.6B/0123456789ab-01234567-int4-v2")
    record = {"record_version": 1, "model": "Qwen/Qwen3-0.6B", "revisions": {"main": "a" * 40}, "replaced": False}
    (kept / "npqwen-source.json").write_text(json.dumps(record))
    for folder, made_from in (("own/0", "/a/own"), ("twice/0", "/a/twice"), ("twice/1", "/b/twice")):
        local = small_model(cache / "local" / folder)
        (local / "npqwen-source.json").write_text(json.dumps(record | {"model": made_from, "revisions": {}}))
    place = tmp_path / "here"
    small_model(place / "my-model")
    small_model(place / "my-models" / "other")
    (place / "model.gguf").touch()
    (place / "notes.txt").touch()
    monkeypatch.chdir(place)
    return place


def test_names_of_models(shelf: Path) -> None:
    assert complete("chat", "Qwen/") == ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"]
    assert complete("chat", "qwen3-0") == ["Qwen3-0.6B"]
    known = ["/a/twice", "/b/twice", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", "own"]
    assert complete("info", "") == [*known, "model.gguf", "my-model"]
    assert complete("rm", "") == known
    assert complete("rm", "no") == []
    assert complete("batch", "in", "out", "--model", "Qwen/Qwen3-4") == ["Qwen/Qwen3-4B"]
    assert complete("serve", "my-model", "Qwen/Qwen3-0") == ["Qwen/Qwen3-0.6B"]
    assert complete("eval", "my-model", "text", "--against", "Qwen/Qwen3-0") == ["Qwen/Qwen3-0.6B"]


def test_places_of_models(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete("chat", "my") == ["my-model"]
    assert complete("chat", "my-models/") == [os.path.join("my-models", "other")]
    assert complete("chat", f"{shelf}{os.sep}mo") == [str(shelf / "model.gguf")]
    assert complete("chat", "no") == ["FILES"]  # the shell finds notes.txt, and directories on the way to models
    monkeypatch.setenv("HOME", str(shelf))
    monkeypatch.setenv("USERPROFILE", str(shelf))
    assert complete("chat", "~/my-") == [os.path.join("~", "my-model")]


def test_without_any_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    assert complete("chat", "Qwen") == ["FILES"]


def test_options_and_values() -> None:
    assert complete("co") == ["completions", "convert"]
    assert complete("completions", "") == ["bash", "zsh", "fish"]
    assert complete("cache", "pr") == ["prune"]
    assert complete("chat", "model", "--kv", "") == ["int8", "f16", "f32"]
    assert complete("chat", "model", "--bits", "") == ["3", "4", "8", "16"]
    assert complete("convert", "model", "--calibrate", "se") == ["self"]
    assert complete("convert", "model", "--calibrate", "no") == ["FILES"]
    assert "--top-p" in complete("chat", "--top")
    assert complete("chat", "model", "What ") == []
    assert complete("embed", "model", "x") == ["FILES"]
    assert complete("no-command", "--bi") == []
    assert complete("chat", "--no-option", "model", "--bi") == ["--bits"]


def test_every_text_is_decided_on() -> None:
    """A new parameter completes models, words or files, or belongs into the list of those that are plain texts."""
    undecided = {
        f"{name} {parameter.name}"
        for name, parameter in parameters()
        if parameter.type is click.STRING and parameter.name not in NO_FILES
    }
    assert undecided == set()


def test_completing_is_quick() -> None:
    """It happens while somebody waits for a key: without Numba, NumPy and the hub's client."""
    code = (
        "import sys; from npqwen.commands.cli import cli; from click.shell_completion import ShellComplete; "
        "print(len(ShellComplete(cli, {}, 'npqwen', 'X').get_completions(['chat'], ''))); "
        "print({'numba', 'numpy', 'huggingface_hub.hf_api', 'prompt_toolkit', 'starlette'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


# --- real shells ---


@pytest.fixture
def program(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on PATH with the command `npqwen`."""
    place = tmp_path / "bin"
    place.mkdir()
    script = place / "npqwen"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m npqwen "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    return place


def shell(name: str, *words: str) -> str:
    path = shutil.which(name)
    if path is None or sys.platform == "win32":
        pytest.skip(f"there is no {name}")
    done = subprocess.run([path, *words], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.usefixtures("program")
def test_bash() -> None:
    code = """
    if [ "${BASH_VERSINFO[0]}" -lt 4 ]; then echo old; exit; fi
    eval "$(npqwen completions bash)"
    complete -p npqwen
    COMP_WORDS=(npqwen chat Qwen/) COMP_CWORD=2
    _npqwen_completion npqwen
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    lines = shell("bash", "--norc", "-c", code).splitlines()
    assert lines in (
        ["old"],
        ["complete -o nosort -F _npqwen_completion npqwen", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"],
    )


@pytest.mark.usefixtures("program")
def test_fish() -> None:
    code = "npqwen completions fish | source; complete -C 'npqwen chat Qwen/'; complete -C 'npqwen doc'"
    names = [line.split("\t")[0] for line in shell("fish", "--no-config", "-c", code).splitlines()]
    assert names == ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", "doctor"]


@pytest.mark.usefixtures("program")
def test_zsh() -> None:
    """The functions of zsh's completion are replaced by some that print what they are given."""
    code = """
    compdef() { echo compdef "$@"; }
    compadd() { echo "${(P)@[-1]}"; }
    _describe() { echo "${(P)3}"; }
    eval "$(npqwen completions zsh)"
    words=(npqwen chat Qwen/) CURRENT=3
    _npqwen_completion
    """
    lines = shell("zsh", "-f", "-c", code).splitlines()
    assert lines[0] == "compdef _npqwen_completion npqwen"
    assert "Qwen/Qwen3-0.6B Qwen/Qwen3-4B" in " ".join(lines[1:])
