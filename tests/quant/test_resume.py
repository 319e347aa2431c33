"""Conversions that are killed, at every file event and with what was not synced lost: the next one resumes."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, write_checkpoint
from npqwen_quant import Shards, convert, convert_shards
from npqwen_quant.calibration import Calibration
from npqwen_quant.placed_file import PlacedFile

from npqwen.errors import CheckpointError, OutputError

Conversion = Callable[[Path, Path, int], None]

_MUTATING = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


class Killed(BaseException):
    """The process is gone: nothing catches this, and no file is changed afterwards."""


class Events:
    """Counts what changes files below a directory, and lets it fail from some event on.

    error: what is raised at event `at` (counted from 1): Killed from then on, anything else once.
    """

    def __init__(self) -> None:
        self.root, self.at, self.count = "", 0, 0
        self.error: BaseException = Killed()
        self.failed = False
        self.synced: dict[int, bytes] = {}
        """The content of files when they were synced, by their inodes."""
        sys.addaudithook(self._audit)  # for good, as Python has no way to remove it

    def watch(self, root: Path, at: int, error: BaseException) -> None:
        self.synced = {path.stat().st_ino: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.root, self.at, self.count, self.error, self.failed = str(root), at, 0, error, False

    def stop(self) -> None:
        self.root = ""

    def happens(self) -> None:
        """An event: it fails now, or does not."""
        self.count += 1
        if self.failed and isinstance(self.error, Killed):
            raise self.error
        if self.count == self.at:
            self.failed = True
            raise self.error

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root and event in _MUTATING and str(arguments[0]).startswith(self.root):
            if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.happens()

    def lose_power(self) -> None:
        """Leave of every file what was synced, and rubbish in place of the others."""
        root, self.root = self.root, ""
        for path in Path(root).rglob("*"):
            if path.is_file() and path.name != "lock":
                path.write_bytes(self.synced.get(path.stat().st_ino, b"\x55" * min(1000, path.stat().st_size)))


@pytest.fixture(scope="module")
def every_event() -> Events:
    return Events()


@pytest.fixture
def events(every_event: Events, monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    """Syncs after every 10 kB are events, as are writes, which may end half-way."""
    fsync, flush = os.fsync, PlacedFile.flush

    def synced(descriptor: int) -> None:
        if every_event.root:
            every_event.happens()
            fsync(descriptor)
            status = os.fstat(descriptor)
            try:
                every_event.synced[status.st_ino] = os.pread(descriptor, status.st_size, 0)
            except OSError:  # opened for writing only, or a directory
                if (path := Path(f"/proc/self/fd/{descriptor}")).is_file():
                    every_event.synced[status.st_ino] = path.read_bytes()

    def torn(file: PlacedFile) -> None:
        try:
            if every_event.root:
                every_event.happens()
        except BaseException:
            del file._buffer[len(file._buffer) // 2 :]
            flush(file)
            raise
        flush(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(PlacedFile, "flush", torn)
    monkeypatch.setattr("npqwen_quant.writer.SYNC_BYTES", 10_000)
    monkeypatch.setattr("npqwen_quant.steps.WEIGHTS", 3000)
    yield every_event
    every_event.stop()


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def one_file(source: Path, out: Path, threads: int) -> None:
    convert(source, out, threads=threads)


def in_shards(source: Path, out: Path, threads: int) -> None:
    convert(source, out, 3, threads=threads, shard_bytes=30_000)


def low_disk(source: Path, out: Path, threads: int) -> None:
    def fetch(name: str, place: Path) -> Path:
        if not (place / name).exists():
            with open(place / "partial", "wb") as file:
                file.write((source / name).read_bytes())
                os.fsync(file.fileno())
            (place / "partial").rename(place / name)
        return place / name

    files = {path.name: path.stat().st_size for path in source.glob("*.safetensors")}
    convert_shards(source, out, Shards("1", files, fetch), threads=threads, shard_bytes=30_000)


def calibrated(source: Path, out: Path, threads: int) -> None:
    def make(place: Path) -> np.ndarray:
        return np.random.default_rng(1).integers(0, 203, (6, 20))

    convert(source, out, threads=threads, calibration=Calibration("text", make))


def replacing(source: Path, out: Path, threads: int) -> None:
    convert(source, out, threads=threads, force=True)


KINDS: dict[str, Conversion] = {
    function.__name__: function for function in (one_file, in_shards, low_disk, calibrated, replacing)
}
POINTS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "in"
    write_checkpoint(directory, make_config(tie_word_embeddings=False), shards=3)
    (directory / "generation_config.json").write_text("{}")
    return directory


def points(count: int, seed: int) -> list[int]:
    """Events to fail at: the first and last ones, and some between."""
    between = np.random.default_rng(seed).choice(np.arange(3, count - 2), POINTS - 6, replace=False)
    return sorted({1, 2, *between.tolist(), count - 3, count - 2, count - 1, count})


@pytest.mark.skipif(sys.platform != "linux", reason="reads what was synced by way of /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_conversion_is_resumed(tmp_path: Path, events: Events, source: Path, kind: str) -> None:
    """Without power, so that all that was not synced is lost; twice, with other numbers of threads."""
    run = KINDS[kind]
    place = tmp_path / "place"

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if kind == "replacing":
            convert(source, place / "out", 8)

    begin()
    events.watch(place, 0, Killed())
    run(source, place / "out", 2)
    count, want = events.count, contents(place / "out")
    assert sorted(os.listdir(place)) == ["out"]
    for at in points(count, len(kind)):
        begin()
        for threads, later in ((2, at), (1, max(1, at // 2))):
            events.watch(place, later, Killed())
            try:
                run(source, place / "out", threads)
            except Killed:
                events.lose_power()
            else:
                assert not events.failed or contents(place / "out") == want  # killed in tidying up
                break
            if (place / "out" / "config.json").exists():  # complete: the one before, or the new one
                assert kind == "replacing" or contents(place / "out") == want
                if kind != "replacing":
                    break
        events.stop()
        if kind == "replacing" or not (place / "out").exists():
            run(source, place / "out", 3)
        assert contents(place / "out") == want, at
        if sorted(os.listdir(place)) != ["out"]:  # what the kill left after the model had its name
            run(source, place / "other", 1)
            with pytest.raises(OutputError, match="exists already"):
                convert(source, place / "out")
            shutil.rmtree(place / "other")
        assert sorted(os.listdir(place)) == ["out"], at
