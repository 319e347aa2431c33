"""The output of a conversion: complete or absent, whatever happens."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from checkpoints import make_config, write_checkpoint
from npqwen_quant import convert, working
from npqwen_quant.placed_file import PlacedFile
from npqwen_quant.working import WorkingDirectory

from npqwen import file_lock
from npqwen.errors import OutputError
from npqwen.reports.verification import verify


def bits_of(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text())["quantization_config"]["bits"])


def test_output_within_the_source_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a" / "in"
    write_checkpoint(source)
    places = [source, source / "out", source / "x" / "y", tmp_path / "a", source / ".." / "in"]
    if sys.platform != "win32":  # where links need a privilege
        (tmp_path / "link").symlink_to(source, target_is_directory=True)
        places += [tmp_path / "link", tmp_path / "link" / "x" / "y"]
    before = sorted(tmp_path.rglob("*"))
    for out in places:
        for force in (False, True):
            with pytest.raises(OutputError, match="choose another place"):
                convert(source, out, force=force)
    assert sorted(tmp_path.rglob("*")) == before


def test_output_exists(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    out = tmp_path / "deep" / "er" / "out"
    convert(tmp_path / "in", out, 4)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        convert(tmp_path / "in", out, 8)
    with pytest.raises(ZeroDivisionError):
        convert(tmp_path / "in", out, 8, force=True, progress=lambda done, total: 1 // 0)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    convert(tmp_path / "in", out, 8, force=True)
    assert bits_of(out) == 8
    assert os.listdir(out.parent) == ["out"]


def test_force_replaces_nothing_but_models(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name in ("home", "file"):
        with pytest.raises(OutputError, match="exists already"):
            convert(tmp_path / "in", tmp_path / name, force=True)
    assert (tmp_path / "home" / "thesis").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "in", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_output_that_appears_during_the_conversion(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")

    def intrude(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("")

    with pytest.raises(OutputError, match="exists already"):
        convert(tmp_path / "in", tmp_path / "out", progress=intrude)
    assert os.listdir(tmp_path / "out") == ["theirs"]
    shutil.rmtree(tmp_path / "out")
    shown: list[int] = []
    convert(tmp_path / "in", tmp_path / "out", progress=lambda done, total: shown.append(total - done))
    assert shown == [0]  # all that was done is resumed
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_windows_refuses_to_replace_a_model_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows does not rename a directory with a mapped file. The old model stays, and nothing of the new one."""
    write_checkpoint(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "out":
            raise PermissionError(errno.EACCES, "Access is denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match=r"out cannot be replaced \(Access is denied\); end the programs"):
        convert(tmp_path / "in", tmp_path / "out", bits=8, force=True)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert bits_of(tmp_path / "out") == 4


def never(done: int, total: int) -> None:
    pytest.fail("started")


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_cannot_be_replaced_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """Such as a bind mount on the same disk."""
    write_checkpoint(tmp_path / "in")
    out = tmp_path / "out"
    if force:
        convert(tmp_path / "in", out)
    else:
        out.mkdir()
    before = sorted(out.iterdir())
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OutputError, match="out cannot be written: Device or resource busy"):
        convert(tmp_path / "in", out, force=force, progress=never)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert sorted(out.iterdir()) == before


def test_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "in")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(OutputError, match="out is a mount point; name a directory inside it"):
        convert(tmp_path / "in", tmp_path / "out", progress=never)
    convert(tmp_path / "in", tmp_path / "out" / "model")


def test_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "in")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for out in (".", tmp_path / "out"):
        with pytest.raises(OutputError, match="out is the current directory; name a directory inside it"):
            convert(tmp_path / "in", out, progress=never)
    convert(tmp_path / "in", "model")
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_an_empty_directory_survives_a_failed_conversion(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    (tmp_path / "out").mkdir(mode=0o700)
    before = (tmp_path / "out").stat()
    with pytest.raises(ZeroDivisionError):
        convert(tmp_path / "in", tmp_path / "out", progress=lambda done, total: 1 // 0)
    after = (tmp_path / "out").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.parametrize("step", ["aside", "in its place"])
def test_ctrl_c_while_a_model_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Where names cannot be exchanged in one step."""
    write_checkpoint(tmp_path / "in")
    out = tmp_path / "out"
    convert(tmp_path / "in", out)
    monkeypatch.setattr("npqwen_quant.output.exchange", lambda first, second: False)
    rename = Path.rename
    working = False

    def start(done: int, total: int) -> None:
        nonlocal working
        working = True

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal working
        if working and (path == out) == (step == "aside"):
            working = False
            rename(path, target)
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", out, 8, force=True, progress=start)
    assert bits_of(out) == (4 if step == "aside" else 8)
    monkeypatch.setattr(Path, "rename", rename)
    convert(tmp_path / "in", out, 8, force=True)
    assert bits_of(out) == 8
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_replaced_model_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    """After every rename, except between the two that are needed where names cannot be exchanged in one step."""
    write_checkpoint(tmp_path / "in")
    out = tmp_path / "out"
    convert(tmp_path / "in", out)
    if not exchanges or sys.platform != "linux":
        monkeypatch.setattr("npqwen_quant.output.exchange", lambda first, second: False)
    away = []
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        if out in (path, target):
            away.append(not (out / "config.json").exists())
        return renamed

    def start(done: int, total: int) -> None:
        monkeypatch.setattr(Path, "rename", watched)

    convert(tmp_path / "in", out, 8, force=True, progress=start)
    assert bits_of(out) == 8
    assert away == ([] if exchanges and sys.platform == "linux" else [True, False])
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_model_that_a_killed_conversion_moved_aside_is_restored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / ".out.partial-0123456789ab").mkdir()
    (tmp_path / ".out.partial-0123456789ab" / "lock").touch()
    (tmp_path / "out").rename(tmp_path / ".out.partial-0123456789ab" / "old")
    with pytest.raises(OutputError, match="exists already"):
        convert(tmp_path / "in", tmp_path / "out", 8)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert bits_of(tmp_path / "out") == 4


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not remove an open file")
@pytest.mark.parametrize("held", [True, False])
def test_a_working_directory_that_another_conversion_removes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """It may be removed between the lock's creation and its locking; held: while this one tries to lock it."""
    try_lock = file_lock.try_lock
    removed: list[Path] = []

    def late(file: BinaryIO) -> bool:
        if removed:
            return try_lock(file)
        removed.append(Path(file.name).parent)
        shutil.rmtree(removed[0])
        return not held and try_lock(file)

    monkeypatch.setattr(working, "try_lock", late)
    work = WorkingDirectory.open(tmp_path / "out", "key")
    assert removed == [work.path]
    with open(work.path / "lock", "r+b") as other:
        assert not try_lock(other)
    work.remove()
    work.unlock()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows whether a process works in a directory there: each conversion has its own."""

    def refuse(file: BinaryIO) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(working, "try_lock", refuse)
    write_checkpoint(tmp_path / "in")
    (tmp_path / ".out.partial-0123456789ab").mkdir()
    (tmp_path / ".out.partial-0123456789ab" / "lock").touch()

    def second(done: int, total: int) -> None:
        if not (tmp_path / "out").exists():
            convert(tmp_path / "in", tmp_path / "out", 4)

    with pytest.raises(OutputError, match="exists already"):
        convert(tmp_path / "in", tmp_path / "out", 4, progress=second)
    assert sorted(os.listdir(tmp_path)) == [".out.partial-0123456789ab", "in", "out"]


def test_similar_names_are_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    theirs = [".out.old-backup", ".out.partial-backup00", ".out.partial-notes", ".outer.partial-0123456789ab"]
    for name in (*theirs, ".out.partial-0123456789ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    convert(tmp_path / "in", tmp_path / "out")
    convert(tmp_path / "in", tmp_path / "out", force=True)
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "in", "out"])


def test_a_disk_that_cannot_be_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "in")

    def closed(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", closed)
    with pytest.raises(OutputError, match="out cannot be written: Permission denied"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_full_disk_is_noticed_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "in")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 50_000, 50_000))
    with pytest.raises(OutputError, match=r"would take .* MB, but only 50 kB is free"):
        convert(tmp_path / "in", tmp_path / "out", progress=never)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("write_bytes", [1, 1000, 4096, 1 << 21])
def test_files_are_written_in_aligned_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_bytes: int) -> None:
    """Each begins at a multiple of its size, whatever the sizes of the data: empty, or many times larger."""
    monkeypatch.setattr("npqwen_quant.placed_file.WRITE_BYTES", write_bytes)
    sizes = []

    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() % write_bytes == 0:
                sizes.append(len(data))
            return super().write(data[: max(1, len(data) - 7)])  # a disk that takes less than all

    monkeypatch.setattr(
        "npqwen_quant.placed_file.open", lambda path, mode, buffering, opener: Slow(path, "w+"), raising=False
    )
    data = np.random.default_rng(0).bytes(10_000)
    file = PlacedFile(tmp_path / "file")
    for start, end in pairwise([0, 1, 1, 500, 999, 1000, 1001, 9_500, 10_000]):
        file.write(start, memoryview(data)[start:end])
    file.flush()
    file.close()
    assert (tmp_path / "file").read_bytes() == data
    whole, rest = divmod(len(data), write_bytes)
    assert sizes == [write_bytes] * whole + [rest] * (rest > 0)


def test_a_disk_that_becomes_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "in", shards=2)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"out does not fit: no room is left"):
        convert(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """A limit on the size of files, reached in the middle of a shard."""
    write_checkpoint(tmp_path / "in")
    code = f"""
import resource, signal
from pathlib import Path
from npqwen import file_lock
from npqwen.errors import OutputError
from npqwen.reports.verification import verify
from npqwen_quant import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    convert(Path({str(tmp_path / "in")!r}), Path({str(tmp_path / "out")!r}), 16)
except OutputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert "out cannot be written: File too large" in done.stdout
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        convert(tmp_path / "in", tmp_path / "locked" / "out")


def test_parent_is_a_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        convert(tmp_path / "in", tmp_path / "file" / "out")


@pytest.mark.parametrize("bits", [4, 16])
def test_ctrl_c(tmp_path: Path, bits: int) -> None:
    write_checkpoint(tmp_path / "in", make_config(vocab_size=20000, hidden_size=256))

    def interrupt(done: int, total: int) -> None:
        assert not (tmp_path / "out").exists()
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", bits, progress=interrupt)
    assert os.listdir(tmp_path) == ["in"]


def test_races_for_one_place_end_in_a_whole_model_or_a_clear_refusal(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    refused: list[str] = []

    def compete(bits: int) -> None:
        for _ in range(6):
            try:
                convert(tmp_path / "in", tmp_path / "out", bits, force=bits != 3, threads=1)
            except OutputError as error:
                refused.append(str(error))

    rivals = [threading.Thread(target=compete, args=(bits,)) for bits in (3, 4, 4, 8)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    known = ("exists already", "being converted by another process")
    assert [line for line in refused if not any(part in line for part in known)] == []
    assert verify(tmp_path / "out").is_right
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
