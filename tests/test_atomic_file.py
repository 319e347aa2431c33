"""Atomic replacement of files: what is replaced, what is refused, and what a failed write leaves."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from npqwen import atomic_file
from npqwen.atomic_file import exchange, new_file, sync_file
from npqwen.errors import OutputError

posix = pytest.mark.skipif(sys.platform == "win32", reason="links, permissions and devices of POSIX")


def test_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    path.parent.mkdir()
    with new_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with new_file(path) as file:
        file.write(b"other")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"other"
    assert os.listdir(path.parent) == ["file"]


@posix
@pytest.mark.parametrize("supported", [True, False])
def test_macos_empties_the_cache_of_the_drive(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def fcntl(descriptor: int, command: int) -> None:
        calls.append((descriptor, command))
        if not supported:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(atomic_file, "fcntl", SimpleNamespace(fcntl=fcntl, F_FULLFSYNC=51), raising=False)
    monkeypatch.setattr(os, "fsync", calls.append)
    sync_file(7)
    assert calls == [(7, 51), *([] if supported else [7])]


@pytest.mark.parametrize(
    ("raised", "seen", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "file does not fit: no room is left"),
        (OSError(errno.EIO, "Input/output error"), OutputError, "file cannot be written: Input/output error"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OutputError("ours"), OutputError, "ours"),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, raised: BaseException, seen: type[BaseException], message: str | None
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def fail() -> None:
        with new_file(tmp_path / "file") as file:
            file.write(b"new")
            raise raised

    with pytest.raises(seen, match=message):
        fail()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, message in [
        (tmp_path, "is a directory; give the name of a file"),
        (tmp_path / "file" / "x", "x cannot be written"),
        (tmp_path / "misspelled" / "x", "the directory .*misspelled does not exist; create it, or choose another"),
        (tmp_path / ("x" * 300), "cannot be written"),
        (Path(os.devnull), "is not a regular file|cannot be written"),
    ]:
        with pytest.raises(OutputError, match=message), new_file(path):
            pytest.fail("opened")
    assert os.listdir(tmp_path) == ["file"]


@posix
def test_links_and_permissions_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "file"
    file.parent.mkdir()
    file.write_bytes(b"old")
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    with new_file(tmp_path / "link") as written:
        written.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert file.read_bytes() == b"new"
    assert file.stat().st_mode & 0o777 == 0o600


def test_leftovers_of_killed_processes_are_removed_later(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".file.partial-a", ".file.partial-b", ".x.partial-a"))
    for file in (old, new, other):
        file.write_bytes(b"x")
    for file in (old, other):
        os.utime(file, (time.time() - 4000,) * 2)
    with new_file(tmp_path / "file"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".file.partial-b", ".x.partial-a", "file"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 of Linux")
def test_names_are_exchanged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")
