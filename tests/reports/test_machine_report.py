"""`npqwen bench --report`: what it writes, what it keeps to itself, and where it cannot write."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from npqwen import OutputError
from npqwen.commands import cli
from npqwen.reports import machine_report

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's files")


@pytest.mark.parametrize("name", ["result.json", "result.md", None])
def test_the_command_writes_a_report_with_nothing_private(
    name: str | None,
    tiny: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "secret-of-jane" / "my-model"
    shutil.copytree(tiny(4), model)
    monkeypatch.chdir(tmp_path)
    args = ["bench", str(model), "--prefill", "4", "--decode", "2", "--repeat", "1", "--threads", "2", "--report"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*args, *([] if name is None else [name])])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0
    assert "| prefill 4 | 0 |" in out
    place = tmp_path / (name or "npqwen-bench.md")
    assert err == f"report written to {place.name}\n"
    text = place.read_text(encoding="utf-8")
    if name == "result.json":
        assert json.loads(text)["measures"][1]["tokens"] == 2
    else:
        assert text.startswith("npqwen ")
    private = [platform.node(), "secret-of-jane", "my-model", str(Path.home()), str(tmp_path), os.sep + "tmp"]
    for secret in [*private, getpass.getuser()]:
        # Short names such as `vm` or `root` may be part of another word.
        assert not secret or not re.search(rf"(?<![\w-]){re.escape(secret)}(?![\w-])", text), secret


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("nowhere/result.md", "nowhere is not a directory"),
        (".", "is a directory"),
        ("file/result.md", "file is not a directory"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_measuring(
    place: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:  # There is no such model, but that comes later.
        cli.main(["bench", str(tmp_path / "model"), "--report", place])
    assert stopped.value.code == 2
    assert re.fullmatch(rf"npqwen: error: {problem}.*\n|npqwen: error: \S* ?{problem}.*\n", capsys.readouterr().err)


def test_paths_without_permission_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="is not writable; give another path"):
        machine_report.check_path(tmp_path / ("x" * 300 + ".md"))
    (tmp_path / "result.md").touch()
    for refused in ("result.md", tmp_path.name):  # a file, and a folder for a new one
        monkeypatch.setattr(os, "access", lambda path, mode, refused=refused: Path(path).name != refused)
        with pytest.raises(OutputError, match="is not writable; give another path"):
            machine_report.check_path(tmp_path / ("result.md" if refused == "result.md" else "new.md"))
    monkeypatch.undo()

    def closed(path: Path, **options: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", closed)
    with pytest.raises(OutputError, match="is not writable; give another path"):
        machine_report.check_path(tmp_path / "result.md")


@linux
def test_a_report_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine_report.check_path(Path("~/result.md")) == tmp_path / "result.md"


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        machine_report.write({"measures": []}, tmp_path / "result.json")
