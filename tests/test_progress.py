"""Progress bars of the library: where somebody watches, and nowhere else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import npqwen_quant
import pytest
from checkpoints import TINY

import npqwen
from npqwen import hub
from npqwen.progress import Bars


class Stderr(io.StringIO):
    """stderr; a terminal unless it says otherwise."""

    terminal = True

    def isatty(self) -> bool:
        return self.terminal


class Notebooks(Stderr):
    """stderr as ipykernel replaces it."""

    __module__ = "ipykernel.iostream"
    terminal = False


class File(Stderr):
    """stderr redirected to a file."""

    terminal = False


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bars appear even for what takes no time; conversions are made anew."""
    monkeypatch.setattr("npqwen.progress._DELAY", 0)
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "cache"))


def shown(monkeypatch: pytest.MonkeyPatch, stderr: Stderr, run: Callable[[], object]) -> str:
    monkeypatch.setattr(sys, "stderr", stderr)
    run()
    return stderr.getvalue()


@pytest.mark.parametrize(
    ("stderr", "progress", "visible"),
    [
        (Stderr, None, True),
        (Notebooks, None, True),
        (File, None, False),
        (Stderr, False, False),
        (Notebooks, False, False),
        (Stderr, True, True),
        (File, True, True),
    ],
)
@pytest.mark.parametrize("call", ["convert", "load"])
def test_bars_are_shown_where_somebody_watches_or_where_they_are_requested(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    call: str,
    stderr: type[Stderr],
    progress: bool | None,
    visible: bool,
) -> None:
    def run() -> None:
        if call == "convert":
            npqwen_quant.convert(TINY, tmp_path / "out", progress=progress)
        else:
            npqwen.load(TINY, threads=1, progress=progress).close()

    text = shown(monkeypatch, stderr(), run)
    assert ("converting: 100%" in text) == visible
    assert visible or text == ""
    assert capsys.readouterr().out == ""


def test_nothing_is_shown_if_nothing_has_to_be_done(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    path = tiny(4)
    assert shown(monkeypatch, Stderr(), lambda: npqwen.load(path, threads=1).close()) == ""


def test_a_function_takes_the_place_of_all_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded: list[tuple[int, int]] = []
    converted: list[tuple[int, int]] = []

    def run() -> None:
        npqwen.load(TINY, threads=1, progress=lambda *state: loaded.append(state)).close()
        npqwen_quant.convert(TINY, tmp_path / "out", progress=lambda *state: converted.append(state))

    assert shown(monkeypatch, Stderr(), run) == ""
    for seen in (loaded, converted):
        assert seen[0][0] == 0
        assert seen[-1][0] == seen[-1][1] > 1_000_000


def test_every_part_of_loading_has_its_bar_or_its_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What downloads and compiles is replaced: here it would take minutes."""
    given: dict[str, Any] = {}

    def resolve(model: Any, bits: Any, *, progress: Any, download_bars: bool, **rest: Any) -> Path:
        given.update(rest, download_bars=download_bars)
        if progress:
            progress(5_000_000, 10_000_000)
        return tmp_path

    def load(path: Path, *, on_compile: Any, name: str, **rest: Any) -> None:
        given.update(name=name)
        if on_compile:
            on_compile(3, 40)
            on_compile(40, 40)

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr("npqwen.model.load", load)
    text = shown(monkeypatch, Stderr(), lambda: npqwen.load("Qwen/Qwen3-0.6B"))
    place = {"revision": None, "low_disk": False, "notice": None}
    assert given == {**place, "download_bars": True, "name": "Qwen/Qwen3-0.6B"}
    assert "converting:  50%" in text
    assert "5.00M/10.0M" in text
    assert "compiling kernels (once): 100%" in text
    assert text.endswith("\n")
    seen: list[tuple[int, int]] = []
    text = shown(monkeypatch, Stderr(), lambda: npqwen.load(tmp_path, on_compile=lambda *state: seen.append(state)))
    assert "converting" in text
    assert "compiling" not in text
    assert seen == [(3, 40), (40, 40)]
    assert given["name"] == tmp_path.name
    assert shown(monkeypatch, Stderr(), lambda: npqwen.load(tmp_path, progress=False)) == ""
    assert given["download_bars"] is False


def test_an_interrupted_bar_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stderr()
    monkeypatch.setattr(sys, "stderr", stderr)

    def run() -> None:
        with Bars() as bars:
            follow = bars.of("converting")
            assert follow is not None
            follow(1, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert stderr.getvalue().endswith("\n")


@pytest.mark.parametrize("progress", ["yes", 1, [True], 0.5])
def test_progress_is_a_switch_or_a_function(tmp_path: Path, progress: Any) -> None:
    for call in (
        lambda: npqwen.load(TINY, progress=progress),
        lambda: npqwen_quant.convert(TINY, tmp_path / "out", progress=progress),
    ):
        with pytest.raises(npqwen.OptionError, match=r"progress is .*; it must be True, False, None or a function"):
            call()


CONVERT = """
import sys
import npqwen.progress
npqwen.progress._DELAY = 0
import npqwen_quant
npqwen_quant.convert(sys.argv[1], sys.argv[2])
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pseudoterminals are POSIX's")
@pytest.mark.parametrize("switch", [{}, {"TQDM_DISABLE": "1"}], ids=["shown", "TQDM_DISABLE"])
def test_on_a_real_terminal(tmp_path: Path, kernels: Path, switch: dict[str, str]) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    environment = os.environ | {"NPQWEN_CACHE": str(kernels.parent.parent)} | switch
    command = [sys.executable, "-c", CONVERT, str(TINY), str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=120)
    os.close(theirs)
    text = b""
    try:
        while data := os.read(ours, 65536):
            text += data
    except OSError:  # Linux reports the closed other end so
        pass
    os.close(ours)
    assert (done.returncode, done.stdout) == (0, b"done\n"), text
    assert (b"converting: 100%" in text) == (not switch)
    assert not switch or text == b""
