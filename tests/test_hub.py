"""From MODEL to a converted directory: checkpoints, a fake hub on this machine, and no hub at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import npqwen_quant.output
import pytest
from checkpoints import write_checkpoint
from fake_hub import FakeHub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from npqwen import hub
from npqwen.errors import CheckpointError, ModelNotFoundError, OptionError, OutputError
from npqwen.format.quantization import Quantization


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("NPQWEN_CACHE", str(place))
    return place


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "my model"
    write_checkpoint(directory)
    return directory


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The output directories of all conversions."""
    convert = npqwen_quant.convert
    places: list[Path] = []

    def counted(source: Path, out: Path, *args: Any, **options: Any) -> None:
        places.append(out)
        convert(source, out, *args, **options)

    monkeypatch.setattr(npqwen_quant, "convert", counted)
    return places


def bits_of(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text())["quantization_config"]["bits"])


def test_a_checkpoint_is_converted_once_into_the_cache(
    checkpoint: Path, cache: Path, conversions: list[Path]
) -> None:
    notices: list[str] = []
    progress: list[tuple[int, int]] = []
    first = hub.resolve(checkpoint, notice=notices.append, progress=lambda *state: progress.append(state))
    assert cache in first.parents
    assert bits_of(first) == 4
    assert notices == [f"converting {checkpoint} to int4, once, into {first}"]
    assert progress[-1][0] == progress[-1][1] > 0
    notices.clear()
    assert hub.resolve(str(checkpoint), 4, notice=notices.append) == first
    assert notices == [f"using {first}"]
    assert len(conversions) == 1


def test_other_bits_and_other_files_are_other_conversions(
    checkpoint: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    places = [hub.resolve(checkpoint, bits) for bits in (4, 8, 16)]
    assert [bits_of(place) for place in places] == [4, 8, 16]

    stat = (checkpoint / "model.safetensors").stat()
    write_checkpoint(checkpoint)
    os.utime(checkpoint / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    places.append(hub.resolve(checkpoint))

    (checkpoint / "generation_config.json").write_text("{}")
    places.append(hub.resolve(checkpoint))
    assert (places[-1] / "generation_config.json").exists()

    shutil.copytree(checkpoint, tmp_path / "copy")
    places.append(hub.resolve(tmp_path / "copy"))
    assert len(set(places)) == len(conversions) == 6

    (checkpoint / "README.md").write_text("no part of the model")
    assert hub.resolve(checkpoint) == places[-2]


def test_a_link_is_the_directory_it_names(checkpoint: Path, tmp_path: Path, conversions: list[Path]) -> None:
    try:
        (tmp_path / "link").symlink_to(checkpoint, target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    assert hub.resolve(tmp_path / "link") == hub.resolve(checkpoint)
    assert len(conversions) == 1


def test_a_converted_directory_is_used_in_place(
    checkpoint: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    out = tmp_path / "out"
    assert hub.convert(checkpoint, out, 8) == out
    assert hub.resolve(out) == hub.resolve(out, 8) == out
    with pytest.raises(OptionError, match="converted to 8 bits, but 4 were requested"):
        hub.resolve(out, 4)
    with pytest.raises(CheckpointError, match="converted already"):
        hub.convert(out)
    assert len(conversions) == 1


@pytest.mark.parametrize("bits", [0, 5, "4", True, 4.5])
def test_impossible_bits(checkpoint: Path, bits: Any) -> None:
    for function in (hub.resolve, hub.convert):
        with pytest.raises(OptionError, match="it can be 3, 4, 8 or 16"):
            function(checkpoint, bits=bits)


def test_convert_into_the_cache_and_again_by_force(checkpoint: Path, conversions: list[Path]) -> None:
    place = hub.convert(checkpoint)
    assert place == hub.resolve(checkpoint) == hub.convert(checkpoint)
    assert len(conversions) == 1
    assert hub.convert(checkpoint, force=True) == place
    assert len(conversions) == 2


def test_convert_does_not_replace_what_is_there(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.convert(checkpoint, out)
    with pytest.raises(OutputError, match="exists already"):
        hub.convert(checkpoint, out, 8)
    hub.convert(checkpoint, out, 8, force=True)
    assert bits_of(out) == 8


def test_the_result_of_a_faster_process_is_used(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = npqwen_quant.convert

    def overtaken(source: Path, out: Path, bits: int, **options: Any) -> None:
        convert(source, out, bits)  # the other process
        convert(source, out, bits, **options)

    monkeypatch.setattr(npqwen_quant, "convert", overtaken)
    assert bits_of(hub.resolve(checkpoint)) == 4


def test_two_processes_at_once(checkpoint: Path, cache: Path) -> None:
    script = f"from npqwen import hub; print(hub.resolve({str(checkpoint)!r}))"
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in "ab"]
    outputs = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (place,) = outputs
    assert sorted(path.name for path in Path(place).parent.iterdir()) == [Path(place).name]
    assert Quantization.from_directory(Path(place)).recipe.bits == 4


def test_a_cache_that_cannot_be_written_names_the_way_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match="NPQWEN_CACHE can name another place"):
        hub.resolve(checkpoint)


def test_a_broken_checkpoint_leaves_nothing(checkpoint: Path, cache: Path) -> None:
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[:-10])
    notices: list[str] = []
    with pytest.raises(CheckpointError, match="truncated"):
        hub.resolve(checkpoint, notice=notices.append)
    assert notices == []
    assert not [path for path in cache.rglob("*") if path.is_file()]


class Hub(SimpleNamespace):
    """huggingface_hub with one repository, org/name, at `commit`; `error` is raised by every query."""

    commit = "1" * 40
    error: Exception | None = None


@pytest.fixture
def remote(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    state = Hub(downloads=[], local=set())

    class Api:
        def model_info(self, repository: str, timeout: float) -> Any:
            if state.error is not None:
                raise state.error
            return SimpleNamespace(sha=state.commit)

    def snapshot_download(repository: str, *, local_files_only: bool, **patterns: Any) -> str:
        place = tmp_path / "snapshots" / state.commit
        if local_files_only and (repository != "org/name" or not place.exists()):
            raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
        if not local_files_only:
            state.downloads.append(repository)
            shutil.copytree(checkpoint, place, dirs_exist_ok=True)
        return str(place)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_commit_is_downloaded_and_converted_once(
    remote: Hub, tmp_path: Path, conversions: list[Path]
) -> None:
    first = hub.resolve("org/name")
    shutil.rmtree(tmp_path / "snapshots")  # the download is not needed any more
    assert hub.resolve("org/name") == first
    assert len(remote.downloads) == len(conversions) == 1
    remote.commit = "2" * 40
    assert hub.resolve("org/name") != first
    assert len(remote.downloads) == len(conversions) == 2


def test_without_the_hub_the_newest_conversion_is_used(remote: Hub, conversions: list[Path]) -> None:
    old = hub.resolve("org/name", 8)
    remote.commit = "2" * 40
    new = hub.resolve("org/name", 8)
    os.utime(old, (1, 1))
    remote.error = OSError("no route to host\nand more")
    notices: list[str] = []
    assert hub.resolve("org/name", 8, notice=notices.append) == new
    assert notices == [f"the hub cannot be reached (no route to host); using {new}"]


def test_without_the_hub_an_earlier_download_is_converted(remote: Hub, conversions: list[Path]) -> None:
    hub.resolve("org/name", 8)
    remote.error = OSError("no route to host")
    notices: list[str] = []
    assert bits_of(hub.resolve("org/name", 4, notice=notices.append)) == 4
    assert notices[0] == "the hub cannot be reached (no route to host); using the copy downloaded before"
    assert len(remote.downloads) == 1


def test_without_the_hub_and_without_a_copy(remote: Hub) -> None:
    remote.error = OSError("no route to host")
    message = r"there is no directory org/name, it is not in the cache, and the hub cannot be reached \(no route"
    with pytest.raises(ModelNotFoundError, match=message):
        hub.resolve("org/name")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_login(remote: Hub, status: int, conversions: list[Path]) -> None:
    kept = hub.resolve("org/name", 8)
    remote.error = OSError(f"Client error {status}")
    remote.error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    problem = f"the hub refuses the login (Client error {status}): renew HF_TOKEN, or log in again with `hf auth login`"
    notices: list[str] = []
    assert hub.resolve("org/name", 8, notice=notices.append) == kept
    assert notices == [f"{problem}; using {kept}"]
    with pytest.raises(ModelNotFoundError, match="not in the cache, and the hub refuses the login"):
        hub.resolve("org/other")


@pytest.mark.parametrize("sha", [None, ""])
def test_a_hub_without_a_commit(remote: Hub, sha: Any) -> None:
    kept = hub.resolve("org/name")
    remote.commit = sha
    notices: list[str] = []
    assert hub.resolve("org/name", notice=notices.append) == kept
    assert notices == [f"the hub names no commit; using {kept}"]


def test_a_proxy_page_does_not_hide_a_conversion(remote: Hub) -> None:
    """A proxy's page, read as JSON; its words could be meant for the terminal."""
    kept = hub.resolve("org/name")
    remote.error = json.JSONDecodeError("Expecting \x1b]0;\u202evalue\x07", "<html>", 0)
    notices: list[str] = []
    assert hub.resolve("org/name", notice=notices.append) == kept
    page = "Expecting ]0;value: line 1 column 1 (char 0)"
    assert notices == [f"the hub cannot be reached ({page}); using {kept}"]


def test_a_name_that_the_client_refuses(remote: Hub) -> None:
    remote.error = HFValidationError("Cannot have -- or .. in repo_id: 'org/a--b'.")
    with pytest.raises(ModelNotFoundError, match=r"cannot be downloaded: Cannot have -- or \.\. in repo_id"):
        hub.resolve("org/a--b")


def test_a_repository_of_a_converted_model_is_used_in_place(
    remote: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    converted = hub.convert(checkpoint, tmp_path / "converted", 8)
    shutil.rmtree(checkpoint)
    shutil.copytree(converted, checkpoint)
    assert hub.resolve("org/name") == tmp_path / "snapshots" / remote.commit
    with pytest.raises(OptionError, match="converted to 8 bits"):
        hub.resolve("org/name", 4)


def test_a_full_disk_during_the_download(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OutputError, match="the disk is full"):
        hub.resolve("org/name")


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    server = FakeHub()
    yield server
    server.close()


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(endpoint: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "npqwen", *args],
            env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")} | environment,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )

    return run


def test_the_real_client_against_a_hub_of_our_own(
    fake_hub: FakeHub,
    command: Callable[..., subprocess.CompletedProcess[str]],
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    others = {"pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "sub/model.safetensors": b"x"}
    template = "additional_chat_templates/rag.jinja"
    commit = fake_hub.publish("org/name", checkpoint, others | {template: b"{{ messages }}"})
    first = command(fake_hub.url, "convert", "org/name", "--bits", "8")
    assert first.returncode == 0, first.stderr
    place = Path(first.stdout.strip())
    assert place.name == f"{commit[:12]}-int8-v2"
    assert bits_of(place) == 8
    assert sorted(fake_hub.downloads) == [template, "config.json", "model.safetensors"]
    assert (place / template).read_bytes() == b"{{ messages }}"
    assert first.stderr.splitlines()[0].startswith("downloading org/name")
    assert "%" not in first.stderr  # no progress bars: stderr is not a terminal

    offline = command(fake_hub.url, "convert", "org/name", str(tmp_path / "out"), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert bits_of(tmp_path / "out") == 4
    assert len(fake_hub.downloads) == 3


def test_the_real_client_finds_no_repository_and_no_hub(
    fake_hub: FakeHub, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    absent = command(fake_hub.url, "generate", "org/absent", "Hello")
    assert absent.returncode == 2
    assert absent.stdout == ""
    (line,) = absent.stderr.splitlines()
    assert line.startswith("npqwen: error: there is no directory org/absent, and no such repository on ")
    fake_hub.close()
    unreachable = command(fake_hub.url, "generate", "org/absent", "Hello")
    assert unreachable.returncode == 2
    (line,) = unreachable.stderr.splitlines()
    absence = "there is no directory org/absent, it is not in the cache, and the hub cannot be reached ("
    assert line.startswith(f"npqwen: error: {absence}")
