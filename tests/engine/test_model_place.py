"""MODEL as a path: directories, paths that are not models, and where their conversions are stored."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from npqwen import hub
from npqwen.cache_directory import cache_directory
from npqwen.errors import CheckpointError, ModelNotFoundError, OptionError, OutputError
from npqwen.format.recipe import recipe_of
from npqwen.hub import conversions
from npqwen.hub.names import HubName

posix = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege, homes are set in other ways")


@pytest.fixture(autouse=True)
def no_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # the hub is not even asked


NEITHER = ["./nothing", "/no/such/place", "a/b/c", "nothing", "", "-x/y", "a b/c", "../x", "~nobody-here", "x" * 5000]


@pytest.mark.parametrize("model", [*NEITHER, "a\0b"])
def test_names_that_are_neither_path_nor_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)  # nothing beside it has one of these names
    with pytest.raises((ModelNotFoundError, CheckpointError), match=r"neither a dir|config\.json is miss|is empty"):
        hub.resolve(model)


@pytest.mark.parametrize("model", [3, None, b"x"])
def test_what_is_no_name_is_refused(model: Any) -> None:
    with pytest.raises(OptionError, match="it must be a string or a Path"):
        hub.resolve(model)


def test_a_file_is_not_a_model(checkpoint: Path) -> None:
    for path in (checkpoint / "model.safetensors", checkpoint / "config.json"):
        with pytest.raises(ModelNotFoundError, match="is a file; give its directory"):
            hub.resolve(path)
    with pytest.raises(ModelNotFoundError, match="neither a directory nor a hub id"):
        hub.resolve(checkpoint / "model.safetensors" / "inside")


def closed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `directory` look like another user's, unreadable even for root."""
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> os.stat_result:
        if directory in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)


def test_a_directory_that_this_user_cannot_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed(checkpoint.parent, monkeypatch)
    for path in (checkpoint, checkpoint.parent / "x"):
        with pytest.raises(ModelNotFoundError, match=f"{path.name} cannot be read: Permission denied"):
            hub.resolve(path)
        with pytest.raises(ModelNotFoundError, match=f"{path.name} cannot be read: Permission denied"):
            hub.convert(path, checkpoint.parent / "out")


def test_files_that_this_user_cannot_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed(checkpoint, monkeypatch)
    with pytest.raises(CheckpointError, match=r"my model.* cannot be read: Permission denied"):
        hub.resolve(checkpoint)


@posix
def test_broken_links_do_not_exist(checkpoint: Path) -> None:
    place = hub.resolve(checkpoint)
    (checkpoint / "vocab.json").symlink_to(checkpoint / "pruned")
    assert hub.resolve(checkpoint) == place
    (checkpoint / "model.safetensors").rename(checkpoint / "gone")
    (checkpoint / "model.safetensors").symlink_to(checkpoint / "pruned")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        hub.resolve(checkpoint)


@posix
def test_a_tilde_is_the_home_directory(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.convert("~/my model", "~/out") == tmp_path / "out"
    assert hub.resolve("~/out") == tmp_path / "out"


def test_a_cache_in_the_home_of_nobody_is_a_plain_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPQWEN_CACHE", "~nobody-here/cache")
    assert cache_directory() == Path("~nobody-here/cache")


def test_without_a_home_directory_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPQWEN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OutputError, match="name a directory in NPQWEN_CACHE"):
        cache_directory()


def test_an_unreadable_cache_counts_as_empty(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, pattern: str) -> list[Path]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "glob", refuse)
    assert conversions._newest_conversion(HubName("org/name"), recipe_of(4)) is None
