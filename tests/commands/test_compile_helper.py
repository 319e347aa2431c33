"""The process that compiles kernels beside a command: what it compiles, when it starts, and that it ends."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import wait_until

from npqwen.commands.compile_helper import CompileHelper

STEPS = 95


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that a helper starts, on a machine with two CPUs."""
    found: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr("npqwen.commands.compile_helper.usable_cpus", lambda: 2)
    return found


def test_it_compiles_what_is_missing_and_ends_with_the_load(
    tiny: Callable[[int], Path],
    kernels: Path,
    started: list[subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import npqwen

    with npqwen.load(tiny(16)):  # whose kernels are there then
        pass
    own = tmp_path / "cache" / "kernels" / kernels.name
    shutil.copytree(kernels, own)
    missing = sorted(path.name for path in own.glob("append.append_value_float32*"))
    assert missing
    for name in missing:
        (own / name).unlink()
    for name in ("numpy", "npqwen", "threading"):  # what Python would import from the current directory
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the current directory')\n")
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    reported: list[tuple[int, int]] = []
    helper = CompileHelper(tiny(16), None, lambda done, total: reported.append((done, total)))
    assert not started
    for done in range(3):
        helper(done, STEPS)
    assert len(started) == 1
    wait_until(lambda: all((own / name).exists() for name in missing))
    helper(STEPS, STEPS)
    assert started[0].poll() is not None
    assert reported == [(0, STEPS), (1, STEPS), (2, STEPS), (STEPS, STEPS)]


def test_it_ends_with_its_parent(
    tiny: Callable[[int], Path],
    started: list[subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path))
    CompileHelper(tiny(16), "f16", lambda *_: None)(0, STEPS)
    (process,) = started
    wait_until(lambda: any(tmp_path.glob("kernels/*/*.nbc")))  # it is in the middle
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(300) == 0
    assert not list(tmp_path.glob("kernels/*/append*.nbc"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("npqwen.commands.compile_helper.usable_cpus", lambda: 1),
        ("npqwen.kernels.compiled.kernel_directory", lambda: Path("/nowhere/kernels")),
        ("sys.executable", "/nowhere/python"),
        ("sys.executable", ""),
    ],
)
def test_a_command_does_without_it(
    tiny: Callable[[int], Path],
    started: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: Any,
) -> None:
    reported: list[int] = []
    helper = CompileHelper(tiny(16), None, lambda done, _: reported.append(done))
    monkeypatch.setattr(name, value)
    helper(0, STEPS)
    helper(STEPS, STEPS)
    assert not started
    assert reported == [0, STEPS]
