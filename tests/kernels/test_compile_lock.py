"""Processes that need the same function compile it once; without locks, each compiles its own."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
from fresh_kernels import COMPILED, load
from numba.core.errors import TypingError

from npqwen.errors import KernelCacheWarning
from npqwen.file_lock import try_lock
from npqwen.kernels import compile_events, compile_lock
from npqwen.kernels.compile_events import FUNCTIONS
from npqwen.kernels.compiled import unusable_files


def fail(x: Any) -> None:
    x.missing += 1


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A kernel directory that does not exist yet."""
    return tmp_path / "kernels" / "isa"


@pytest.fixture
def lock(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The function's lock file, which is not there."""
    paths: list[Path] = []
    init = compile_lock.CompileLock.__init__

    def note(self: Any, path: Path) -> None:
        paths.append(path)
        init(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(compile_lock.CompileLock, "__init__", note)
        assert load(directory) == COMPILED
    for file in directory.iterdir():
        file.unlink()
    (path,) = paths
    assert path.parent == directory
    return path


def test_no_lock_is_left(directory: Path) -> None:
    assert load(directory) == COMPILED
    assert sorted(path.suffix for path in directory.iterdir()) == [".nbc", ".nbi"]
    assert load(directory) == []


def test_what_another_process_compiles_meanwhile_is_loaded(lock: Path) -> None:
    load(lock.parent)
    stored = {path: path.read_bytes() for path in lock.parent.iterdir()}
    for path in stored:
        path.unlink()
    with open(lock, "wb") as file:
        assert try_lock(file)
        waiting, found = threading.Event(), []
        counted = threading.Thread(target=lambda: found.append(load(lock.parent)))
        report = compile_events._Counter.on_start

        def on_start(self: Any, event: Any) -> None:
            report(self, event)
            waiting.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compile_events._Counter, "on_start", on_start)
            counted.start()
            assert waiting.wait(60)
        for path, content in stored.items():
            path.write_bytes(content)
            path.chmod(0o600)
    counted.join(60)
    assert found == [COMPILED]  # the progress of waiting
    assert all(path.read_bytes() == content for path, content in stored.items())


@pytest.mark.parametrize("content", [b"", b"anything"])
def test_the_lock_of_a_killed_process_is_taken(lock: Path, content: bytes) -> None:
    lock.write_bytes(content)
    assert unusable_files(lock.parent) == {}
    assert load(lock.parent) == COMPILED
    assert not lock.exists()


def test_a_suspended_process_is_not_waited_for_forever(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_lock, "TIMEOUT", 0.1)
    with open(lock, "wb") as file:
        assert try_lock(file)
        assert load(lock.parent) == [(0, FUNCTIONS), *COMPILED]
        assert lock.exists()
    assert load(lock.parent) == []


def test_a_file_system_without_locks_keeps_kernels(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Any) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(compile_lock, "try_lock", refuse)
    assert load(directory) == COMPILED
    assert load(directory) == []


def test_a_directory_that_cannot_be_made_is_a_warning(directory: Path) -> None:
    directory.parent.parent.mkdir(exist_ok=True)
    directory.parent.write_text("a file")
    with pytest.warns(KernelCacheWarning, match="cannot be written: kernels are compiled at every start"):
        assert load(directory) == COMPILED


def test_a_function_that_cannot_be_compiled_is_unlocked(directory: Path) -> None:
    for _ in range(2):
        with pytest.raises(TypingError):
            load(directory, fail)
        assert list(directory.iterdir()) == []
