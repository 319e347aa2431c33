"""Processes that need the same function compile it once; without locks, each compiles its own."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from npqwen.file_lock import try_lock
from npqwen.kernels import compile_lock, compiled
from npqwen.kernels.compiled import FUNCTIONS, compile_kernel, reporting, unusable_files


def add_one(x: Any) -> None:
    x[0] += 1


def fail(x: Any) -> None:
    x.missing += 1


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel directory, empty."""
    place = tmp_path / "kernels" / "isa"
    monkeypatch.setattr(compiled, "kernel_directory", lambda: place)
    return place


def compile_anew(function: Callable[[Any], None] = add_one) -> list[tuple[int, int]]:
    """Load or compile a function as another process would; returns the reported progress."""
    calls: list[tuple[int, int]] = []
    kernel, x = njit(function), np.zeros(1)
    with reporting(lambda done, total: calls.append((done, total))):
        compile_kernel(kernel, (x,))
    kernel(x)
    assert x[0] == 1
    return calls


COMPILED = [(0, FUNCTIONS), (FUNCTIONS, FUNCTIONS)]


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
        assert compile_anew() == COMPILED
    for file in directory.iterdir():
        file.unlink()
    (path,) = paths
    assert path.parent == directory
    return path


def test_no_lock_is_left(directory: Path) -> None:
    assert compile_anew() == COMPILED
    assert sorted(path.suffix for path in directory.iterdir()) == [".nbc", ".nbi"]
    assert compile_anew() == []


def test_what_another_process_compiles_meanwhile_is_loaded(lock: Path) -> None:
    compile_anew()
    stored = {path: path.read_bytes() for path in lock.parent.iterdir()}
    for path in stored:
        path.unlink()
    with open(lock, "wb") as file:
        assert try_lock(file)
        waiting, found = threading.Event(), []
        counted = threading.Thread(target=lambda: found.append(compile_anew()))
        report = compiled._Counter.on_start

        def on_start(self: Any, event: Any) -> None:
            report(self, event)
            waiting.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled._Counter, "on_start", on_start)
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
    assert compile_anew() == COMPILED
    assert not lock.exists()


def test_a_suspended_process_is_not_waited_for_forever(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_lock, "PATIENCE", 0.1)
    with open(lock, "wb") as file:
        assert try_lock(file)
        assert compile_anew() == [(0, FUNCTIONS), *COMPILED]
        assert lock.exists()
    assert compile_anew() == []


def test_a_file_system_without_locks_keeps_kernels(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Any) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(compile_lock, "try_lock", refuse)
    assert compile_anew() == COMPILED
    assert compile_anew() == []


def test_a_directory_that_cannot_be_made_is_no_error(directory: Path) -> None:
    directory.parent.parent.mkdir(exist_ok=True)
    directory.parent.write_text("a file")
    assert compile_anew() == COMPILED


def test_a_function_that_cannot_be_compiled_is_unlocked(directory: Path) -> None:
    for _ in range(2):
        with pytest.raises(TypingError):
            compile_anew(fail)
        assert list(directory.iterdir()) == []
