"""Models of the hub: downloaded and converted once for each content, told and checked before; and without a hub."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyte
import pytest
from checkpoints import make_config, read_safetensors, write_checkpoint
from fake_hub import Connection, FakeHub
from huggingface_hub.errors import HFValidationError

from npqwen import hub
from npqwen.errors import CheckpointError, ModelNotFoundError, OptionError, OutputError
from npqwen.hub import disk_space, record
from npqwen.hub.repository import download_directory

pytestmark = pytest.mark.usefixtures("cache")

WEIGHTS = "model.safetensors"


def bits_of(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text())["quantization_config"]["bits"])


def test_a_model_is_downloaded_and_converted_once(
    fake_hub: FakeHub, checkpoint: Path, cache: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    commit = fake_hub.publish("org/name", checkpoint, {"README.md": b"one", "pytorch_model.bin": b"x"})
    notices: list[str] = []
    first = hub.resolve("org/name", notice=notices.append)
    assert first.parent == cache / "hub" / "org--name"
    assert "pytorch_model.bin" not in fake_hub.downloads
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    config = (checkpoint / "config.json").stat().st_size
    told = next(line for line in notices if line.startswith("downloading org/name: "))
    assert f": {(size - config) / 1000:.0f} kB into {tmp_path / 'hf'} (" in told  # config.json is here already
    converted = sum(tensor.nbytes for tensor in read_safetensors(first / WEIGHTS).values())
    assert told.endswith(f" free), then converting it to int4, about {converted / 1000:.0f} kB")
    shutil.rmtree(tmp_path / "hf")  # the download is not needed any more
    assert hub.resolve("org/name") == first
    found = record.read(first)
    assert found == record.Record("org/name", {"main": commit})
    assert len(conversions) == fake_hub.downloads.count(WEIGHTS) == 1


def test_no_bar_of_a_download_is_left_among_later_lines(
    fake_hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    stderr = Screen()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("COLUMNS", "100")
    fake_hub.publish("org/name", checkpoint)
    notices: list[str] = []

    def notice(line: str) -> None:
        notices.append(line)
        stderr.write(f"{line}\n")

    hub.resolve("org/name", notice=notice, download_bars=True)
    assert "Fetching" in stderr.getvalue()
    assert "model.safetensors:   0%" in stderr.getvalue()
    screen = pyte.Screen(1000, 50)
    pyte.Stream(screen).feed(stderr.getvalue().replace("\n", "\r\n"))
    assert [row.rstrip() for row in screen.display if row.strip()] == notices
    assert len(notices) == 2


def test_a_new_commit_with_the_same_contents_converts_and_downloads_nothing(
    fake_hub: FakeHub, checkpoint: Path, conversions: list[Path]
) -> None:
    fake_hub.publish("org/name", checkpoint, {"README.md": b"one"})
    first = hub.resolve("org/name")
    commit = fake_hub.publish("org/name", checkpoint, {"README.md": b"two"})
    fake_hub.downloads.clear()
    assert hub.resolve("org/name") == first
    assert fake_hub.downloads == []
    assert record.read(first) == record.Record("org/name", {"main": commit})
    assert len(conversions) == 1


def test_new_small_files_are_fetched_without_the_weights(
    fake_hub: FakeHub, checkpoint: Path, conversions: list[Path]
) -> None:
    fake_hub.publish("org/name", checkpoint)
    first = hub.resolve("org/name")
    commit = fake_hub.publish("org/name", checkpoint, {"chat_template.jinja": b"{{ messages }}"})
    second = hub.resolve("org/name")
    assert (second / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    assert (second / WEIGHTS).samefile(first / WEIGHTS)
    assert len(conversions) == fake_hub.downloads.count(WEIGHTS) == 1
    assert record.read(second) == record.Record("org/name", {"main": commit})
    old = record.read(first)
    assert old is not None
    assert old.replaced


def test_new_weights_are_converted_and_replace_the_old_ones(
    fake_hub: FakeHub, checkpoint: Path, conversions: list[Path]
) -> None:
    fake_hub.publish("org/name", checkpoint)
    first = hub.resolve("org/name")
    eight = hub.resolve("org/name", 8)
    old = fake_hub.repositories["org/name"].revisions["main"]
    write_checkpoint(checkpoint, dtype="F32", tokenizer=True)
    fake_hub.publish("org/name", checkpoint)
    assert hub.resolve("org/name") != first
    assert len(conversions) == 3
    assert record.read(first) == record.Record("org/name", {}, replaced=True)
    assert record.read(eight) == record.Record("org/name", {"main": old})  # nothing of 8 bits replaces it
    assert hub.resolve(f"org/name@{old}") == first
    assert record.read(first) == record.Record("org/name", {old: old})


def test_a_revision(fake_hub: FakeHub, checkpoint: Path, conversions: list[Path]) -> None:
    old = fake_hub.publish("org/name", checkpoint, revision="v1")
    write_checkpoint(checkpoint, dtype="F32", tokenizer=True)
    fake_hub.publish("org/name", checkpoint)
    tagged = hub.resolve("org/name@v1", 8)
    newest = hub.resolve("org/name", 8)
    assert tagged != newest
    assert hub.resolve("org/name", 8, revision="v1") == hub.resolve(f"org/name@{old}", 8) == tagged
    assert hub.resolve(f"{fake_hub.url}/org/name/tree/v1", 8) == tagged
    assert len(conversions) == 2
    with pytest.raises(ModelNotFoundError, match="org/name has no revision v2: no branch, tag or commit"):
        hub.resolve("org/name@v2")
    with pytest.raises(OptionError, match="names a revision already"):
        hub.resolve("org/name@v1", revision="main")
    with pytest.raises(OptionError, match="is a directory, which has no revisions"):
        hub.resolve(checkpoint, revision="main")


def test_each_revision_is_found_without_the_hub(fake_hub: FakeHub, connection: Connection, checkpoint: Path) -> None:
    fake_hub.publish("org/name", checkpoint, revision="v1")
    tagged = hub.resolve("org/name@v1")
    write_checkpoint(checkpoint, dtype="F32", tokenizer=True)
    fake_hub.publish("org/name", checkpoint)
    newest = hub.resolve("org/name")
    connection.error = OSError("no route to host")
    assert hub.resolve("org/name@v1") == tagged
    assert hub.resolve("org/name") == newest
    message = "org/name@v2 is neither a directory nor in the cache of downloads, and the hub cannot be reached"
    with pytest.raises(ModelNotFoundError, match=message):
        hub.resolve("org/name@v2")


def test_without_the_hub_the_newest_conversion_is_used(
    fake_hub: FakeHub, connection: Connection, checkpoint: Path
) -> None:
    fake_hub.publish("org/name", checkpoint)
    old = hub.resolve("org/name", 8)
    write_checkpoint(checkpoint, dtype="F32", tokenizer=True)
    fake_hub.publish("org/name", checkpoint)
    new = hub.resolve("org/name", 8)
    os.utime(old / record.NAME)
    connection.error = OSError("no route to host\nand more")
    notices: list[str] = []
    assert hub.resolve("org/name", 8, notice=notices.append) == new
    assert notices == [f"the hub cannot be reached (no route to host); using {new}"]


def test_without_the_hub_an_earlier_download_is_converted(
    fake_hub: FakeHub, connection: Connection, checkpoint: Path, conversions: list[Path]
) -> None:
    fake_hub.publish("org/name", checkpoint)
    hub.resolve("org/name", 8)
    connection.error = OSError("no route to host")
    notices: list[str] = []
    four = hub.resolve("org/name", 4, notice=notices.append)
    assert bits_of(four) == 4
    assert notices[0] == "the hub cannot be reached (no route to host); using the copy downloaded before"
    connection.error = None
    if sys.platform != "win32":  # where the copies are no links, whose targets tell the hub's hashes
        assert hub.resolve("org/name", 4) == four
        assert len(conversions) == 2
    assert fake_hub.downloads.count(WEIGHTS) == 1


def test_without_the_hub_and_without_a_copy(connection: Connection) -> None:
    connection.error = OSError("no route to host")
    message = r"org/name is neither a directory nor in the cache of downloads, and the hub cannot be reached \(no route"
    with pytest.raises(ModelNotFoundError, match=message):
        hub.resolve("org/name")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_login(fake_hub: FakeHub, connection: Connection, checkpoint: Path, status: int) -> None:
    fake_hub.publish("org/name", checkpoint)
    kept = hub.resolve("org/name", 8)
    connection.error = OSError(f"Client error {status}")
    connection.error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    problem = f"the hub refuses the login (Client error {status}): renew HF_TOKEN, or log in again with `hf auth login`"
    notices: list[str] = []
    assert hub.resolve("org/name", 8, notice=notices.append) == kept
    assert notices == [f"{problem}; using {kept}"]
    with pytest.raises(ModelNotFoundError, match="nor in the cache of downloads, and the hub refuses the login"):
        hub.resolve("org/other")


@pytest.mark.parametrize("sha", [None, ""])
def test_a_hub_without_a_commit(fake_hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, sha: Any) -> None:
    fake_hub.publish("org/name", checkpoint)
    kept = hub.resolve("org/name")
    answer = SimpleNamespace(sha=sha)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: answer)
    notices: list[str] = []
    assert hub.resolve("org/name", notice=notices.append) == kept
    assert notices == [f"the hub names no commit; using {kept}"]


def test_a_proxy_page_does_not_hide_a_conversion(fake_hub: FakeHub, connection: Connection, checkpoint: Path) -> None:
    """A proxy's page, read as JSON; its words could be meant for the terminal."""
    fake_hub.publish("org/name", checkpoint)
    kept = hub.resolve("org/name")
    connection.error = json.JSONDecodeError("Expecting \x1b]0;\u202evalue\x07", "<html>", 0)
    notices: list[str] = []
    assert hub.resolve("org/name", notice=notices.append) == kept
    page = "Expecting ]0;value: line 1 column 1 (char 0)"
    assert notices == [f"the hub cannot be reached ({page}); using {kept}"]


def test_a_name_that_the_client_refuses(connection: Connection) -> None:
    connection.error = HFValidationError("Cannot have -- or .. in repo_id: 'org/a--b'.")
    with pytest.raises(ModelNotFoundError, match=r"cannot be downloaded: Cannot have -- or \.\. in repo_id"):
        hub.resolve("org/a--b")


def test_a_repository_of_a_converted_model_is_used_in_place(
    fake_hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    converted = hub.convert(checkpoint, tmp_path / "converted", 8)
    commit = fake_hub.publish("org/name", converted)
    place = hub.resolve("org/name")
    assert place.name == commit
    assert place.is_relative_to(tmp_path / "hf")
    assert hub.resolve("org/name", 8) == place
    with pytest.raises(OptionError, match="converted to 8 bits"):
        hub.resolve("org/name", 4)
    with pytest.raises(CheckpointError, match="converted already"):
        hub.convert("org/name")


@pytest.mark.parametrize("low_disk", [False, True])
@pytest.mark.parametrize("left", [0, 1])
def test_a_repository_that_lacks_a_shard(fake_hub: FakeHub, tmp_path: Path, low_disk: bool, left: int) -> None:
    write_checkpoint(tmp_path / "in", shards=2, tokenizer=True)
    shards = sorted((tmp_path / "in").glob("*.safetensors"))
    for shard in shards[left:]:
        shard.unlink()
    fake_hub.publish("org/name", tmp_path / "in")
    with pytest.raises(CheckpointError, match=f"org/name has no {shards[left].name}, a shard that"):
        hub.resolve("org/name", low_disk=low_disk)
    assert not [name for name in fake_hub.downloads if name.endswith(".safetensors")]


def test_a_full_disk_during_the_download(fake_hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> str:
        raise OSError(28, "No space left on device")

    fake_hub.publish("org/name", checkpoint)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OutputError, match="the disk is full"):
        hub.resolve("org/name")


def test_what_an_interrupted_conversion_has_written_needs_no_room(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npqwen_quant.writer.SYNC_BYTES", 1)
    write_checkpoint(tmp_path / "in", make_config(vocab_size=60_000), tokenizer=True)
    fake_hub.publish("org/name", tmp_path / "in")

    def interrupt(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve("org/name", bits=16, progress=interrupt)
    # The conversion takes 9 MB and 1 MB of reserve; half of it lies there.
    usage = shutil.disk_usage(tmp_path)._replace(free=disk_space._RESERVE + 5_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="for the conversion"):
        hub.convert("org/name", tmp_path / "cache" / "elsewhere", bits=16)
    assert bits_of(hub.resolve("org/name", bits=16)) == 16


def test_too_little_disk_is_refused_before_the_download(
    fake_hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.publish("org/name", checkpoint)
    usage = shutil.disk_usage(tmp_path)._replace(free=disk_space._RESERVE + 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError) as caught:
        hub.resolve("org/name")
    assert fake_hub.downloads == ["config.json"]
    message = str(caught.value)
    assert message.startswith("org/name needs 3")
    assert " kB to download and " in message
    places = f"{download_directory()} and {tmp_path / 'cache' / 'hub' / 'org--name'}"
    assert f" kB for the conversion, but only 67.2 MB are free in {places}; free some, or name other" in message
    assert message.endswith(" kB at a time")  # --low-disk's


def test_what_an_earlier_download_left_is_not_counted_again(
    fake_hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.publish("org/name", checkpoint)
    hub.resolve("org/name", 8)
    notices: list[str] = []
    hub.resolve("org/name", 4, notice=notices.append)
    assert not [line for line in notices if line.startswith("downloading")]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(endpoint: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "npqwen", *args],
            env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")} | environment,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )

    return run


def test_the_command_line_against_a_hub_of_our_own(
    fake_hub: FakeHub,
    command: Callable[..., subprocess.CompletedProcess[str]],
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    others = {"pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "sub/model.safetensors": b"x"}
    template = "additional_chat_templates/rag.jinja"
    fake_hub.publish("org/name", checkpoint, others | {template: b"{{ messages }}"})
    first = command(fake_hub.url, "convert", "org/name", "--bits", "8")
    assert first.returncode == 0, first.stderr
    place = Path(first.stdout.strip())
    assert place.name.endswith("-int8-v2")
    assert bits_of(place) == 8
    assert sorted(fake_hub.downloads) == sorted([template, *(path.name for path in checkpoint.iterdir())])
    assert (place / template).read_bytes() == b"{{ messages }}"
    assert first.stderr.splitlines()[0].startswith("downloading org/name")
    assert "%" not in first.stderr  # no progress bars: stderr is not a terminal

    fetched = len(fake_hub.downloads)
    offline = command(fake_hub.url, "convert", "org/name", str(tmp_path / "out"), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert bits_of(tmp_path / "out") == 4
    assert len(fake_hub.downloads) == fetched


def test_the_command_line_finds_no_repository_and_no_hub(
    fake_hub: FakeHub, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    absent = command(fake_hub.url, "generate", "org/absent", "Hello")
    assert absent.returncode == 2
    assert absent.stdout == ""
    (line,) = absent.stderr.splitlines()
    assert line.startswith("npqwen: error: org/absent is neither a directory nor a repository on the hub ")
    unreachable = command("http://127.0.0.1:9", "generate", "org/absent", "Hello")
    assert unreachable.returncode == 2
    (line,) = unreachable.stderr.splitlines()
    absence = "org/absent is neither a directory nor in the cache of downloads, and the hub cannot be reached ("
    assert line.startswith(f"npqwen: error: {absence}")
