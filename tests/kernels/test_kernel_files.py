"""Files of compiled kernels that are damaged, exchanged or open to others: they count as missing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from fresh_kernels import COMPILED, add_one, load
from npqwen_quant.search import jit

from npqwen.errors import KernelCacheWarning


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel directory with one function."""
    directory = tmp_path_factory.mktemp("filled") / "kernels"
    assert load(directory) == COMPILED
    return directory


@pytest.fixture
def directory(filled: Path, tmp_path: Path) -> Path:
    """A copy of `filled`, to be damaged."""
    return Path(shutil.copytree(filled, tmp_path / "kernels"))


def test_an_undamaged_copy_is_loaded(directory: Path) -> None:
    assert load(directory) == []


def damage(directory: Path, pattern: str, how: str) -> None:
    (file,) = directory.glob(pattern)
    good = file.read_bytes()
    bad = {
        "empty": b"",
        "short": good[: len(good) // 2],
        "other": b"no pickle at all" * 100,
        "random": good[:100] + np.random.default_rng(0).bytes(len(good) - 100),
        "one bit": good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 4]) + good[len(good) // 2 + 1 :],
        "last bit": good[:-1] + bytes([good[-1] ^ 1]),
    }
    file.write_bytes(bad[how])


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("how", ["empty", "short", "other", "random", "one bit", "last bit"])
def test_a_damaged_entry_is_compiled_again(directory: Path, pattern: str, how: str) -> None:
    damage(directory, pattern, how)
    assert load(directory) == COMPILED
    assert load(directory) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in directories")
@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
def test_a_named_pipe_counts_as_missing(directory: Path, pattern: str) -> None:
    (file,) = directory.glob(pattern)
    file.unlink()
    os.mkfifo(file)
    assert load(directory) == COMPILED
    assert load(directory) == []


def test_an_entry_is_only_read_for_its_own_function(directory: Path) -> None:
    """The file of another function would be loaded as code for the same types."""

    def other(x: Any) -> None:
        x[0] = 1

    names = {add_one: next(directory.glob("*.nbc"))}
    assert load(directory, other) == COMPILED
    (names[other],) = set(directory.glob("*.nbc")) - {names[add_one]}
    names[add_one].write_bytes(names[other].read_bytes())
    assert load(directory) == COMPILED
    assert load(directory) == []


def test_files_are_private_to_the_user(filled: Path) -> None:
    if sys.platform != "win32":
        assert filled.stat().st_mode & 0o777 == 0o700
        assert {file.stat().st_mode & 0o777 for file in filled.iterdir()} == {0o600}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
@pytest.mark.parametrize("which", ["directory", "index", "code"])
@pytest.mark.parametrize("how", ["group", "others", "owner"])
def test_code_that_others_could_have_written_is_not_run(directory: Path, which: str, how: str) -> None:
    path = directory if which == "directory" else next(directory.glob({"index": "*.nbi", "code": "*.nbc"}[which]))
    if how == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(path, 12345, -1)
    else:
        path.chmod(path.stat().st_mode | {"group": 0o020, "others": 0o002}[how])
    if which == "directory":
        with pytest.warns(KernelCacheWarning, match=f"{directory} belongs to another user or others may write to it"):
            assert load(directory) == COMPILED
    else:
        assert load(directory) == COMPILED


def test_a_damaged_entry_of_the_converter_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def hits() -> int:
        kernel: Any = jit(add_one)
        x = np.zeros(1)
        kernel(x)
        assert x[0] == 1
        return sum(kernel.stats.cache_hits.values())

    assert (hits(), hits()) == (0, 1)
    (directory,) = tmp_path.iterdir()
    for pattern in ("*.nbi", "*.nbc"):
        for how in ("empty", "random"):
            damage(directory, pattern, how)
            assert (hits(), hits()) == (0, 1)
