"""What Tab completes in a conversation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from npqwen.terminal.completions import completions


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


@pytest.mark.parametrize(
    ("line", "part", "words"),
    [
        ("/set loop_guard o", "o", ["on", "off"]),
        ("/set loop_guard=o", "o", ["on", "off"]),
        ("/set temperature d", "d", ["default"]),
        ("/set parameter temp", "temp", ["temperature"]),
        ("/set verb", "verb", ["verbose"]),
        ("/set no", "no", ["nothink", "nohistory"]),
        ("/show te", "te", ["template"]),
        ("/reasoning f", "f", ["fold"]),
        ("/help ret", "ret", ["retry"]),
        ("/set nonsense o", "o", []),
        ("/retry o", "o", []),
    ],
)
def test_tab_completes_what_a_command_takes(line: str, part: str, words: list[str]) -> None:
    assert completions(line) == (part, words)
