"""Conversions that are killed, at every file event and with what was not synced lost: the next one resumes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, write_checkpoint
from gguf_files import config, encode, metadata, plain
from npqwen_quant import Shards, convert, convert_shards
from npqwen_quant.calibration import Calibration
from npqwen_quant.placed_file import PlacedFile
from npqwen_quant.working import BusyError
from npqwen_quant.writer import Writer

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
        if not self.root or event not in _MUTATING or not str(arguments[0]).startswith(self.root):
            return
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


def from_gguf(source: Path, out: Path, threads: int) -> None:
    path = source.parent / "small.gguf"
    if not path.exists():
        small = config(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
        path.write_bytes(encode(metadata(small), plain(small)[0]))
    convert(path, out, threads=threads)


KINDS: dict[str, Conversion] = {
    function.__name__: function for function in (one_file, in_shards, low_disk, calibrated, replacing, from_gguf)
}
POINTS = dict.fromkeys(KINDS, 6) | {"calibrated": 3}
"""How many events fail; the command tests/bench/kill_conversions.py kills at many more points."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "in"
    write_checkpoint(directory, make_config(tie_word_embeddings=False), shards=3)
    (directory / "generation_config.json").write_text("{}")
    return directory


def points(kind: str, count: int) -> list[int]:
    """Events to fail at: the first, the last ones, and some between."""
    few = POINTS[kind] // 3
    between = np.random.default_rng(len(kind)).choice(np.arange(2, count - few), POINTS[kind] - few - 1, replace=False)
    return sorted([1, *between.tolist(), *range(count - few + 1, count + 1)])


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
    for at in points(kind, count):
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


def test_a_conversion_is_resumed_after_the_disk_was_full(tmp_path: Path, events: Events, source: Path) -> None:
    in_shards(source, tmp_path / "want", 2)
    place = tmp_path / "place"
    place.mkdir()
    for at in (1, 2, 12, 20, 20):
        events.watch(place, at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OutputError, match="out does not fit: no room is left on the disk"):
            in_shards(source, place / "out", 2)
        events.stop()
        assert len(os.listdir(place)) <= (at > 2)
    shown: list[float] = []
    options: dict[str, Any] = {"shard_bytes": 30_000, "progress": lambda done, total: shown.append(done / total)}
    convert(source, place / "out", 3, **options)
    assert shown[0] > 0
    assert contents(place / "out") == contents(tmp_path / "want")
    assert os.listdir(place) == ["out"]


def stop_at(share: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync after every step, and wait for it."""
    begin = Writer._begin_to_sync

    def sync(writer: Writer) -> None:
        begin(writer)
        writer._wait()

    monkeypatch.setattr(Writer, "_begin_to_sync", sync)
    monkeypatch.setattr("npqwen_quant.writer.SYNC_BYTES", 1)
    monkeypatch.setattr("npqwen_quant.steps.WEIGHTS", 3000)


@pytest.mark.usefixtures("often")
def test_ctrl_c_leaves_what_the_next_conversion_resumes_and_says_so(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "want")
    notices: list[str] = []
    shown: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=stop_at(0.6), threads=2, notice=notices.append)
    (work,) = tmp_path.glob(".out.*")
    (said,) = notices
    assert said.endswith(f" of the work is kept in {work}; the next conversion with the same arguments resumes it")
    notices.clear()
    convert(
        source,
        tmp_path / "out",
        progress=lambda done, total: shown.append(done / total),
        threads=3,
        notice=notices.append,
    )
    assert shown[0] > 0.3
    assert notices == [f"resuming an interrupted conversion, of which {shown[0]:.0%} is done"]
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert sorted(os.listdir(tmp_path)) == ["out", "want"]


def test_a_short_conversion_leaves_nothing(tmp_path: Path, source: Path) -> None:
    """What would be done again in seconds is not worth a directory."""
    notices: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=stop_at(0.6), notice=notices.append)
    assert os.listdir(tmp_path) == notices == []


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("change", ["bits", "shard_bytes", "weights", "time", "config"])
def test_another_conversion_to_the_place_begins_anew(tmp_path: Path, source: Path, change: str) -> None:
    shutil.copytree(source, tmp_path / "in")
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", progress=stop_at(0.6))
    assert len([*tmp_path.glob(".out.*")]) == 1
    weights = tmp_path / "in" / "model-00001-of-00003.safetensors"
    options: dict[str, Any] = {}
    if change == "bits":
        options = {"bits": 8}
    elif change == "shard_bytes":
        options = {"shard_bytes": 30_000}
    elif change == "weights":
        data = weights.read_bytes()
        weights.write_bytes(data[:-2] + bytes([data[-2] ^ 1, data[-1]]))
    elif change == "time":
        os.utime(weights, ns=(1, 1))
    else:
        (tmp_path / "in" / "config.json").write_text((source / "config.json").read_text().replace("1e-06", "1e-05"))
    begun: list[int] = []
    convert(tmp_path / "in", tmp_path / "want", **options)
    convert(tmp_path / "in", tmp_path / "out", progress=lambda done, total: begun.append(done), **options)
    assert begun[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "want"]


@pytest.mark.usefixtures("often")
def test_a_checkpoint_that_changes_on_the_way_leaves_nothing(tmp_path: Path, source: Path) -> None:
    shutil.copytree(source, tmp_path / "in")

    def overwrite(done: int, total: int) -> None:
        if done > total // 2:
            with open(tmp_path / "in" / "model-00001-of-00003.safetensors", "r+b") as file:
                file.seek(-8, os.SEEK_END)
                file.write(bytes(8))

    with pytest.raises(CheckpointError, match=r"changed while it was converted; convert the checkpoint again"):
        convert(tmp_path / "in", tmp_path / "out", progress=overwrite)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.usefixtures("often")
def test_room_is_needed_for_what_is_missing_only(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "want", 16)
    nbytes = sum(map(len, contents(tmp_path / "want").values())) + (1 << 20)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", 16, progress=stop_at(0.9))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=nbytes - 100_000))
    with pytest.raises(OutputError, match="would take"):
        convert(source, tmp_path / "elsewhere", 16)
    convert(source, tmp_path / "out", 16)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


@pytest.mark.usefixtures("often")
def test_files_of_an_interrupted_conversion_that_the_checkpoint_has_no_more_are_removed(
    tmp_path: Path, source: Path
) -> None:
    shutil.copytree(source, tmp_path / "in")
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "additional_chat_templates" / "a.jinja").write_text("{{ messages }}")
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", progress=stop_at(0.6))
    shutil.rmtree(tmp_path / "in" / "additional_chat_templates")
    convert(tmp_path / "in", tmp_path / "out")
    convert(source, tmp_path / "want")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


CHILD = """
import sys
import npqwen_quant.steps, npqwen_quant.writer
from npqwen_quant import convert
npqwen_quant.writer.SYNC_BYTES, npqwen_quant.steps.WEIGHTS = 1, 3000
Writer = npqwen_quant.writer.Writer
begin = Writer._begin_to_sync
Writer._begin_to_sync = lambda writer: (begin(writer), writer._wait())
def wait(done, total):
    if done > total // 2:
        print("half", flush=True)
        sys.stdin.read()
convert(sys.argv[1], sys.argv[2], progress=wait)
"""


@pytest.mark.usefixtures("often")
def test_a_process_that_is_killed_and_one_that_lives(tmp_path: Path, source: Path) -> None:
    """While it lives, the same conversion is refused, another one to the same place is made beside it."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, str(source), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"half"
        with pytest.raises(BusyError, match="out is being converted by another process; wait until it ends"):
            convert(source, out)
        convert(source, out, 8)
        assert len([*tmp_path.glob(".out.*")]) == 1
        shutil.rmtree(out)
        process.kill()
        process.wait()
    shown: list[float] = []
    convert(source, out, progress=lambda done, total: shown.append(done / total))
    assert shown[0] > 0.2
    convert(source, tmp_path / "want")
    assert contents(out) == contents(tmp_path / "want")
    assert sorted(os.listdir(tmp_path)) == ["out", "want"]
