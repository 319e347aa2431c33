"""Prefixes on disk: found by later runs and other processes, and never taken for what they are not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
from prefix_pages import Ids, computed, content, marks, new_cache, text

from npqwen.engine import prefix_files, prefix_writer
from npqwen.engine.prefix_files import PrefixFiles
from npqwen.engine.prefixes import Prefixes
from npqwen.errors import OptionError, OutOfMemoryError, OutputError, PrefixCacheWarning
from npqwen.kernels.cache_page import PAGE

BYTES = new_cache().page_bytes
TEXT = text(1, 2 * PAGE + 100)
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


def opened(
    directory: Path,
    *,
    limit: int = 1000 * BYTES,
    fingerprint: str = "model",
    busy: Callable[[], bool] = lambda: False,
    notice: Callable[[str], None] | None = None,
) -> Prefixes:
    """A pool with nothing in memory, as a new process has it."""
    pool = Prefixes(100 * BYTES, notice=notice)
    pool.open(PrefixFiles(directory, limit, new_cache(), fingerprint), busy)
    return pool


def store(directory: Path, *texts: Ids, **options: Any) -> None:
    """What a run does that computes these texts."""
    pool = opened(directory, **options)
    for ids in texts:
        pool.keep(ids, computed(ids))
        pool.close()  # the writer may begin again


def found(pool: Prefixes, ids: Ids) -> int:
    """How many of the tokens there are; they must be what was computed."""
    cache = new_cache()
    length = pool.extend(ids, cache)
    assert np.array_equal(content(cache), marks(ids[:length]))
    return length


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_a_later_run_finds_what_was_computed(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    store(place, TEXT)
    assert len(names(place)) == 3
    pool = opened(place)
    assert found(pool, np.concatenate([TEXT, TEXT])) == len(TEXT)
    assert pool.nbytes == 3 * BYTES  # from now on in memory
    shutil.rmtree(place)
    assert found(pool, np.concatenate([TEXT, TEXT])) == len(TEXT)
    pool.close()
    assert pool.nbytes == 0


@pytest.mark.parametrize("shared", [100, 255, 256, 300, 512, 560])
def test_a_text_that_begins_alike_finds_what_they_share(tmp_path: Path, shared: int) -> None:
    store(tmp_path, TEXT)
    other = np.concatenate([TEXT[:shared], TEXT[shared : shared + 1] + 1, text(2, 300)])
    assert found(opened(tmp_path), other) == shared


def test_memory_and_disk_are_combined(tmp_path: Path) -> None:
    store(tmp_path, TEXT)
    pool = opened(tmp_path)
    short = TEXT[: PAGE + 50]
    pool.keep(short, computed(short))
    assert found(pool, TEXT[:-1]) == len(TEXT) - 1
    pool.close()


def test_the_file_is_plain_safetensors_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    store(tmp_path / "new", TEXT)
    sizes = set()
    for name in names(tmp_path / "new"):
        tensors = safetensors.numpy.load_file(tmp_path / "new" / name)
        assert sorted(tensors) == ["ids", "page"]
        assert tensors["page"].dtype == np.float32
        sizes.add((len(tensors["ids"]), tensors["page"].shape[3]))
        if sys.platform != "win32":
            assert (tmp_path / "new" / name).stat().st_mode & 0o777 == 0o600
    assert sizes == {(256, 16), (100, 7)}
    if sys.platform != "win32":
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_other_models_other_types_and_other_versions_share_a_directory_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, TEXT)
    assert found(opened(tmp_path, fingerprint="another"), TEXT) == 0
    store(tmp_path, TEXT, fingerprint="another")
    assert len(names(tmp_path)) == 6
    with monkeypatch.context() as patch:
        patch.setattr(prefix_files, "VERSION", "0")
        assert found(opened(tmp_path), TEXT) == 0
        store(tmp_path, TEXT)
    assert len(names(tmp_path)) == 9
    assert found(opened(tmp_path), TEXT[:-1]) == len(TEXT) - 1


def test_a_growing_text_leaves_one_incomplete_page(tmp_path: Path) -> None:
    pool = opened(tmp_path)
    for length in range(20, PAGE + 120, 10):
        pool.keep(TEXT[:length], computed(TEXT[:length]))
        pool._writer.close()  # type: ignore[union-attr]
    counts = sorted(len(safetensors.numpy.load_file(tmp_path / name)["ids"]) for name in names(tmp_path))
    assert counts[-1] == PAGE
    assert len(counts) == 2
    assert counts[0] >= 110 - 64


def test_what_is_written_again_is_left_alone(tmp_path: Path) -> None:
    store(tmp_path, TEXT)
    inodes = {name: (tmp_path / name).stat().st_ino for name in names(tmp_path)}
    store(tmp_path, TEXT, TEXT)
    assert {name: (tmp_path / name).stat().st_ino for name in names(tmp_path)} == inodes


def test_the_least_recently_used_file_is_removed_first_and_the_bytes_are_bounded(tmp_path: Path) -> None:
    texts = [text(seed, 2 * PAGE) for seed in range(6)]
    limit = 7 * BYTES
    for ids in texts[:3]:
        store(tmp_path, ids, limit=limit)
    assert sum((tmp_path / name).stat().st_size for name in names(tmp_path)) <= limit
    more = np.zeros(1, np.int32)
    pool = opened(tmp_path, limit=limit)
    assert found(pool, np.concatenate([texts[0], more])) == 2 * PAGE
    pool.keep(texts[0], computed(texts[0]))  # used again, from memory
    pool.close()
    store(tmp_path, texts[3], limit=limit)
    assert sum((tmp_path / name).stat().st_size for name in names(tmp_path)) <= limit
    left = [found(opened(tmp_path), np.concatenate([ids, more])) for ids in texts[:4]]
    assert left == [2 * PAGE, 0, 2 * PAGE, 2 * PAGE] or left == [2 * PAGE, 0, PAGE, 2 * PAGE]


def test_files_that_cannot_be_removed_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows while another process has them open."""
    limit = 3 * BYTES + 4096

    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError(path)
        unlink(path, missing_ok)

    store(tmp_path, text(1, 3 * PAGE), limit=limit)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        for seed in range(2, 5):
            store(tmp_path, text(seed, PAGE), limit=limit)
    assert sum((tmp_path / name).stat().st_size for name in names(tmp_path)) <= limit
    store(tmp_path, text(5, PAGE), limit=limit)
    assert found(opened(tmp_path), np.concatenate([text(5, PAGE), np.zeros(1, np.int32)])) == PAGE


def test_of_a_text_larger_than_the_limit_the_beginning_is_written(tmp_path: Path) -> None:
    ids = text(1, 9 * PAGE)
    store(tmp_path, ids, limit=4 * BYTES)
    assert found(opened(tmp_path), ids) == 3 * PAGE  # and headers


def test_files_of_others_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(bytes(50 * BYTES))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / f"{'0' * 32}-{'0' * 8}-{'0' * 32}.safetensors").mkdir()
    store(tmp_path, text(1, PAGE), text(2, PAGE), text(3, PAGE), limit=2 * BYTES + 4096)
    assert {"notes.txt", "model.safetensors"} < set(names(tmp_path))
    assert len(names(tmp_path)) == 5


def test_directories_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="file is a file; a prefix cache is a directory"):
        opened(file)
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        opened(file / "below")
    with pytest.raises(OptionError, match="is too small: 256 tokens of this model take"):
        opened(tmp_path, limit=BYTES)

    def refused(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        opened(tmp_path)


@contextmanager
def one_warning(match: str) -> Iterator[None]:
    with pytest.warns(PrefixCacheWarning, match=match) as seen:
        yield
    assert len(seen) == 1


def damage(rng: random.Random, directory: Path, victim: str) -> None:
    """Do something to a file that its checks must notice, or that does not matter."""
    path = directory / victim
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    kind = rng.randrange(9)
    if kind == 0:  # a bit anywhere
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # in the header, or in the ids
        data[rng.randrange(min(len(data), 8 + length + 1024))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[rng.randrange(len(data)) :]
    elif kind == 3:
        data += bytes(rng.randrange(1, 5000))
    elif kind == 4:  # what a disk gives back after a power failure
        start = rng.randrange(len(data))
        size = min(rng.choice([1, 512, 4096, 1 << 20]), len(data) - start)
        data[start : start + size] = bytes(size)
    elif kind == 5:  # another page under this name
        data = bytearray((directory / rng.choice([name for name in names(directory) if name != victim])).read_bytes())
    elif kind == 6:  # a header that says something else
        head = json.loads(data[8 : 8 + length])
        what = rng.choice(["format", "format_version", "key", "checksum", "shape", "dtype", "gone", "more"])
        if what in head["__metadata__"]:
            head["__metadata__"][what] = rng.choice(["2", "", "0" * 32, "00000000", "é" * 16])
        elif what == "shape":
            head["ids"]["shape"] = rng.choice([[0], [255], [2**40], [-1], [], ["x"], [1, 256]])
        elif what == "dtype":
            head["page"]["dtype"] = rng.choice(["F16", "U8", "I32", "X", 7])
        elif what == "gone":
            head.pop(rng.choice(["ids", "page", "__metadata__"]))
        else:
            head["more"] = head["ids"]
        written = json.dumps(head, separators=(",", ":")).encode()
        written += b" " * (-(8 + len(written)) % 64)
        data = bytearray(len(written).to_bytes(8, "little") + written + data[8 + length :])
    elif kind == 7:
        data = bytearray(rng.randbytes(rng.choice([0, 7, 8, 100, len(data)])))
    elif kind == 8 and len(data) > 8 + length + 4096:  # two blocks changed places
        at = 8 + length + 1024
        data[at : at + 1024], data[at + 1024 : at + 2048] = data[at + 1024 : at + 2048], data[at : at + 1024]
    path.write_bytes(data)


def test_a_thousand_damaged_files_give_no_wrong_token(tmp_path: Path) -> None:
    other = np.concatenate([TEXT[: PAGE + 40], text(7, 300)])
    store(tmp_path, TEXT, other)
    rng = random.Random(0)
    noticed = 0
    for _ in range(1000):
        victim = rng.choice(names(tmp_path))
        before = (tmp_path / victim).read_bytes()
        damage(rng, tmp_path, victim)
        changed = (tmp_path / victim).read_bytes() != before
        lines: list[str] = []
        pool = opened(tmp_path, notice=lines.append)
        lengths = [found(pool, ids) for ids in (TEXT, other)]  # which compares all of it
        if lines:
            noticed += 1
            assert not (tmp_path / victim).exists()
            assert victim in lines[0]
            assert lines[0].startswith("removed a damaged file of the prefix cache")
        assert lines or not changed or lengths != [len(TEXT) - 1, len(other) - 1]
        pool.close()
        (tmp_path / victim).write_bytes(before)
    assert noticed > 900


def test_a_damaged_file_is_told_once_and_written_again(tmp_path: Path) -> None:
    store(tmp_path, TEXT)
    for name in names(tmp_path):
        with open(tmp_path / name, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
    for page in range(3):  # a run finds the first damaged one, computes the rest and writes it
        pool = opened(tmp_path)
        with one_warning("removed a damaged file of the prefix cache: .*: its checksum is wrong"):
            assert found(pool, TEXT) == page * PAGE
        assert found(pool, TEXT) == page * PAGE  # without another warning
        pool.keep(TEXT, computed(TEXT))
        pool.close()
    assert found(opened(tmp_path), TEXT[:-1]) == len(TEXT) - 1


def test_several_damaged_files_are_one_line(tmp_path: Path) -> None:
    first = [np.concatenate([TEXT[:50], text(seed, 60)]) for seed in range(4)]
    store(tmp_path, *first)
    for name in names(tmp_path):
        (tmp_path / name).write_bytes(b"")
    with one_warning("removed 4 damaged files of the prefix cache in "):
        assert found(opened(tmp_path), TEXT) == 0
    assert names(tmp_path) == []


def test_what_is_no_file_is_told_once_and_left_alone(tmp_path: Path) -> None:
    store(tmp_path, TEXT[:PAGE])
    (name,) = names(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    pool = opened(tmp_path)
    with one_warning("it is not a regular file|Permission denied|Is a directory"):
        assert found(pool, TEXT) == 0
    assert found(pool, TEXT) == 0
    pool.keep(TEXT[:PAGE], computed(TEXT[:PAGE]))
    pool.close()
    assert names(tmp_path) == [name]


def test_a_full_disk_is_told_once_and_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    pool = opened(tmp_path, notice=lines.append)
    clock = [1000.0]
    # Not time.monotonic itself: other threads, such as a server's, would wait for ever.
    monkeypatch.setattr("npqwen.engine.prefix_writer.time", SimpleNamespace(monotonic=lambda: clock[0]))
    full = [True]
    write = os.replace

    def replace(source: Any, target: Any) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for seed in range(3):
        ids = text(seed, PAGE)
        pool.keep(ids, computed(ids))
        pool._writer.close()  # type: ignore[union-attr]
        pool.fetch(text(9, 100))
        clock[0] += 2 * prefix_writer.PAUSE if seed == 1 else 1
    assert len(lines) == 1
    assert "the prefix cache cannot be written for now: " in lines[0]
    assert "no room is left on the disk" in lines[0]
    assert names(tmp_path) == []
    full[0] = False
    clock[0] += 2 * prefix_writer.PAUSE
    pool.keep(TEXT, computed(TEXT))
    pool.close()
    assert len(names(tmp_path)) == 3
    assert len(lines) == 1


def test_without_memory_for_a_page_less_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, TEXT)
    pool = opened(tmp_path)
    files = pool._files
    assert files is not None
    new_page, left = files._new_page, [1]

    def scarce() -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OutOfMemoryError("no memory")
        return new_page()

    monkeypatch.setattr(files, "_new_page", scarce)
    assert found(pool, TEXT) == PAGE


def test_a_page_waits_for_the_model_to_be_idle_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = [True]
    monkeypatch.setattr(prefix_writer, "WAIT", 60.0)
    pool = opened(tmp_path, busy=lambda: busy[0])
    pool.keep(TEXT, computed(TEXT))
    time.sleep(0.2)
    assert names(tmp_path) == []
    assert len(pool.arrays) == 6  # those in memory, and those that wait
    busy[0] = False
    for _ in range(500):
        if len(names(tmp_path)) == 3:
            break
        time.sleep(0.02)
    assert len(names(tmp_path)) == 3
    monkeypatch.setattr(prefix_writer, "WAIT", 0.01)
    busy[0] = True
    ids = text(4, PAGE)
    pool.keep(ids, computed(ids))
    for _ in range(500):
        if len(names(tmp_path)) == 4:
            break
        time.sleep(0.02)
    pool.close()
    assert len([name for name in names(tmp_path) if not name.startswith(".")]) == 4


def test_when_memory_is_short_pages_that_wait_are_given_up_last(tmp_path: Path) -> None:
    pool = opened(tmp_path, busy=lambda: True)
    pool.keep(TEXT, computed(TEXT))
    dropped = 0
    while pool.evict_oldest():
        dropped += 1
    assert dropped >= 3
    assert pool.arrays == []
    pool.close()


@pytest.mark.parametrize("length", [100, 230], ids=["some of the tiles", "all of them"])
def test_an_owner_that_appends_while_a_page_is_written_spoils_nothing(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = text(1, 250)
    cache = computed(ids[:length])
    pool = opened(tmp_path)
    make_room = PrefixFiles._make_room

    def append(self: PrefixFiles, needed: int, used: int) -> bool:
        from prefix_pages import run

        run(cache, ids[length:])  # after the checksum, before the data
        return make_room(self, needed, used)

    monkeypatch.setattr(PrefixFiles, "_make_room", append)
    pool.keep(ids[:length], cache)
    pool.close()
    assert found(opened(tmp_path), ids) == length


def test_too_many_open_files_are_no_damage(tmp_path: Path) -> None:
    store(tmp_path, TEXT)
    before = names(tmp_path)
    pool = opened(tmp_path)
    for target in ("open_regular", "read_header"):
        with mock.patch.object(prefix_files, target, side_effect=OSError(errno.EMFILE, "Too many open files")):
            assert found(pool, TEXT) == 0
    assert names(tmp_path) == before
    assert found(pool, TEXT[:-1]) == len(TEXT) - 1


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from prefix_pages import computed, new_cache, text
from npqwen.engine.prefix_files import PrefixFiles
from npqwen.engine.prefix_page import PrefixPage
place, rng = Path(sys.argv[1]), random.Random(0)
cache = computed(text(0, 256))
(page,) = cache.share(256)
files = PrefixFiles(place, 10**9, cache, "model")
k = 0
while k < 60 or sum(not path.name.startswith(".") for path in place.iterdir()) <= 60:
    child = os.fork()
    if not child:
        for i in range(10**6):
            files.write(PrefixPage(files.root, text(1000 * k + i, 256), page, 0))
    time.sleep(rng.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    k += 1
"""


@posix
def test_kill_9_while_writing_leaves_nothing_that_can_be_taken_for_a_page(tmp_path: Path) -> None:
    place = tmp_path / "place"
    subprocess.run([sys.executable, "-c", KILLED, str(place)], check=True, env=environment(), timeout=120)
    files = PrefixFiles(place, 10**9, new_cache(), "model")
    whole = [name for name in names(place) if prefix_files._NAME.fullmatch(name)]
    assert len(whole) > 60
    for name in whole:
        page = files._read(name, files.root, 0)
        assert page is not None
        assert np.array_equal(page.array, computed(text(0, 256)).share(256)[0])
    assert files.take_damaged() is None
    rest = set(names(place)) - set(whole)
    assert all(name.startswith(".") and ".partial-" in name for name in rest)
    for name in rest:
        os.utime(place / name, (0, 0))
    PrefixFiles(place, 10**9, new_cache(), "model")  # which removes what was abandoned
    assert set(names(place)) == set(whole)


def environment() -> dict[str, str]:
    here = Path(__file__).parents[1]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), str(here.parent / "quant")])}


TOGETHER = """
import random, sys
from pathlib import Path
import numpy as np
from prefix_pages import computed, content, marks, new_cache, run, text
from npqwen.engine.prefix_files import PrefixFiles
from npqwen.engine.prefixes import Prefixes
rng, place = random.Random(int(sys.argv[2])), Path(sys.argv[1])
cache = new_cache()
for _ in range(12):
    files = PrefixFiles(place, 20 * cache.page_bytes, cache, "model")
    pool = Prefixes(30 * cache.page_bytes)
    pool.open(files)
    for _ in range(8):
        ids = np.concatenate([text(rng.randrange(3), rng.randrange(1, 700)), text(rng.randrange(20), 200)])
        cache = new_cache()
        length = pool.extend(ids[:-1], cache)
        run(cache, ids[length:])
        assert np.array_equal(content(cache), marks(ids))
        pool.keep(ids, cache)
    pool.close()
"""


def test_processes_that_share_a_directory_do_not_harm_each_other(tmp_path: Path) -> None:
    """Reading, writing and removing at once; a damaged file would be a warning, which is an error there."""
    command = [sys.executable, "-W", "error", "-c", TOGETHER, str(tmp_path)]
    running = [subprocess.Popen([*command, str(seed)], env=environment(), stderr=subprocess.PIPE) for seed in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, b"")
    sizes = [(tmp_path / name).stat().st_size for name in names(tmp_path)]
    assert 0 < sum(sizes) <= 23 * BYTES  # a page more of each process


def test_what_is_neither_closed_nor_waited_for_is_written(tmp_path: Path) -> None:
    program = TOGETHER.replace("range(12)", "range(1)").replace("    pool.close()\n", "")
    subprocess.run([sys.executable, "-c", program, str(tmp_path), "1"], check=True, env=environment(), timeout=300)
    assert names(tmp_path)
