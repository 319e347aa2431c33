"""--low-disk: at most one file of weights of the source on the disk, and none afterwards."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoints import make_config, write_checkpoint
from fake_hub import FakeHub

from npqwen import hub
from npqwen.errors import CheckpointError, ModelNotFoundError, OptionError, OutputError
from npqwen.format.safetensors import INDEX

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "sharded", make_config(tie_word_embeddings=False), shards=4, tokenizer=True)
    return tmp_path / "sharded"


def weights(*places: Path) -> list[str]:
    """Files of weights of the checkpoint below some directories, whatever they are called meanwhile."""
    found = (path for place in places for path in place.rglob("*") if path.is_file())
    return sorted(path.name for path in found if "-of-00004" in path.name and path.stat().st_size > 1000)


def same(first: Path, second: Path) -> bool:
    names = [
        sorted(path.name for path in place.iterdir() if path.name != "npqwen-source.json") for place in (first, second)
    ]
    return names[0] == names[1] and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names[0]
    )


@pytest.mark.parametrize("into_cache", [True, False])
def test_one_shard_at_a_time(
    fake_hub: FakeHub, sharded: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into_cache: bool
) -> None:
    fake_hub.publish("org/name", sharded)
    want = hub.convert(sharded, tmp_path / "want")
    on_disk: list[list[str]] = []
    notices: list[str] = []

    def progress(done: int, total: int) -> None:
        on_disk.append(weights(cache, tmp_path / "hf", tmp_path / "out", tmp_path))

    shutil.copytree(sharded, tmp_path / "elsewhere")
    total = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    shutil.rmtree(sharded)
    shutil.rmtree(tmp_path / "elsewhere")
    if into_cache:
        place = hub.resolve("org/name", low_disk=True, notice=notices.append, progress=progress)
    else:
        place = hub.convert("org/name", tmp_path / "out", low_disk=True, notice=notices.append, progress=progress)
    assert same(place, want)
    assert max(len(set(names)) for names in on_disk) == 1
    assert weights(tmp_path) == []
    assert [path.name for path in place.parent.iterdir() if path.name.startswith(".")] == []
    assert sorted(name for name in fake_hub.downloads if name.endswith("safetensors")) == [
        f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)
    ]
    assert notices[0].startswith(f"downloading org/name file by file, {total / 1000:.0f} kB in all and ")


def test_a_model_in_one_file(fake_hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    fake_hub.publish("org/name", checkpoint)
    want = hub.convert(checkpoint, tmp_path / "want")
    assert same(hub.resolve("org/name", low_disk=True), want)
    assert fake_hub.downloads.count("model.safetensors") == 1
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_an_interrupted_run_is_resumed(fake_hub: FakeHub, sharded: Path, cache: Path, tmp_path: Path) -> None:
    fake_hub.publish("org/name", sharded)
    want = hub.convert(sharded, tmp_path / "want")
    third = "model-00003-of-00004.safetensors"

    def stop(done: int, total: int) -> None:
        if third in fake_hub.downloads:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve("org/name", low_disk=True, progress=stop)
    assert same(hub.resolve("org/name", low_disk=True), want)
    shards = [name for name in fake_hub.downloads if name.endswith("safetensors")]
    assert len(shards) == len(set(shards)) == 4


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub tries again at once, not after seconds, and writes what it has, not 10 MB."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)


def bytes_sent(fake_hub: FakeHub, name: str) -> int:
    return sum(nbytes for path, nbytes in fake_hub.traffic if path.endswith(name))


@pytest.mark.usefixtures("impatient")
def test_a_download_that_breaks_off_is_continued(fake_hub: FakeHub, sharded: Path, cache: Path, tmp_path: Path) -> None:
    """No byte is fetched twice, though the connection is gone for good in the middle of a file."""
    fake_hub.publish("org/name", sharded)
    want = hub.convert(sharded, tmp_path / "want")
    name = "model-00002-of-00004.safetensors"
    notices: list[str] = []
    for _ in range(2):
        fake_hub.cut[name] = 20_000
        with pytest.raises(ModelNotFoundError, match="org/name cannot be downloaded: "):
            hub.resolve("org/name", low_disk=True, notice=notices.append)
    (partial,) = cache.rglob(f"{name}.incomplete")
    assert partial.stat().st_size == 40_000
    assert notices[-1].endswith("the next conversion with the same arguments resumes it")
    del fake_hub.cut[name]
    assert same(hub.resolve("org/name", low_disk=True), want)
    for path in sharded.glob("*.safetensors"):
        assert bytes_sent(fake_hub, path.name) == path.stat().st_size


@pytest.mark.usefixtures("impatient")
def test_a_partial_download_that_was_damaged_is_fetched_again(
    fake_hub: FakeHub, sharded: Path, cache: Path, tmp_path: Path
) -> None:
    """As after a power failure: its bytes may not have reached the disk."""
    fake_hub.publish("org/name", sharded)
    want = hub.convert(sharded, tmp_path / "want")
    name = "model-00001-of-00004.safetensors"
    fake_hub.cut[name] = 20_000
    with pytest.raises(ModelNotFoundError):
        hub.resolve("org/name", low_disk=True)
    del fake_hub.cut[name]
    (partial,) = cache.rglob(f"{name}.incomplete")
    partial.write_bytes(bytes(20_000))
    assert same(hub.resolve("org/name", low_disk=True), want)


def test_a_file_that_is_not_what_the_hub_says(
    fake_hub: FakeHub, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.publish("org/name", sharded)
    (files,) = fake_hub.repositories["org/name"].commits.values()
    name = "model-00001-of-00004.safetensors"
    whole = files[name]

    def damaged(path: Path, offset: int, nbytes: int) -> str:
        return hashlib.sha256(path.read_bytes().replace(whole[-5:], b"")).hexdigest()

    monkeypatch.setattr("npqwen.hub.repository.digest_of_range", damaged)
    with pytest.raises(CheckpointError, match=f"{name} is not what the hub says it is; try again"):
        hub.resolve("org/name", low_disk=True)


@pytest.mark.usefixtures("impatient")
def test_an_ordinary_download_that_breaks_off_is_continued(fake_hub: FakeHub, sharded: Path, tmp_path: Path) -> None:
    """No byte of the weights is fetched twice; the rest needs less room, and what is told says so."""
    fake_hub.publish("org/name", sharded)
    want = hub.convert(sharded, tmp_path / "want")
    name = "model-00003-of-00004.safetensors"
    for _ in range(2):
        fake_hub.cut[name] = 20_000
        with pytest.raises(ModelNotFoundError, match="org/name cannot be downloaded: "):
            hub.resolve("org/name")
    (partial,) = (tmp_path / "hf").rglob("*.incomplete")
    assert partial.stat().st_size == 40_000
    del fake_hub.cut[name]
    sizes = {path.name: path.stat().st_size for path in sharded.glob("*.safetensors")}
    rest = sizes[name] - 40_000 + sizes["model-00004-of-00004.safetensors"]
    rest += sum(path.stat().st_size for path in sharded.glob("*.json") if path.name not in ("config.json", INDEX))
    notices: list[str] = []
    assert same(hub.resolve("org/name", notice=notices.append), want)
    assert f"downloading org/name: {rest / 1000:.0f} kB into " in notices[0]
    for path, size in sizes.items():
        assert bytes_sent(fake_hub, path) == size
    assert not [*(tmp_path / "hf").rglob("*.incomplete")]
    # It is all in huggingface_hub's cache, as if that had downloaded it.
    snapshot = Path(huggingface_hub.snapshot_download("org/name", local_files_only=True))
    assert all((snapshot / path.name).read_bytes() == path.read_bytes() for path in sharded.iterdir())


@pytest.mark.usefixtures("impatient")
def test_an_ordinary_download_that_was_damaged_is_fetched_again(
    fake_hub: FakeHub, sharded: Path, tmp_path: Path
) -> None:
    fake_hub.publish("org/name", sharded)
    want = hub.convert(sharded, tmp_path / "want")
    name = "model-00001-of-00004.safetensors"
    fake_hub.cut[name] = 20_000
    with pytest.raises(ModelNotFoundError):
        hub.resolve("org/name")
    del fake_hub.cut[name]
    (partial,) = (tmp_path / "hf").rglob("*.incomplete")
    partial.write_bytes(bytes(20_000))
    assert same(hub.resolve("org/name"), want)


def test_without_links_the_hubs_client_downloads(
    fake_hub: FakeHub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would copy what it finds in its cache."""
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda directory: False)
    fake_hub.publish("org/name", sharded)
    hub.resolve("org/name")
    for path in sharded.glob("*.safetensors"):
        assert bytes_sent(fake_hub, path.name) == path.stat().st_size
        (found,) = (tmp_path / "hf").rglob(path.name)
        assert found.read_bytes() == path.read_bytes()
    assert not [path for path in (tmp_path / "hf").rglob("blobs/*") if path.stat().st_size > 20_000]


def test_what_is_in_the_hub_clients_cache_is_used_and_stays(fake_hub: FakeHub, sharded: Path, tmp_path: Path) -> None:
    fake_hub.publish("org/name", sharded)
    hub.resolve("org/name", 8)
    fake_hub.downloads.clear()
    hub.resolve("org/name", 4, low_disk=True)
    assert fake_hub.downloads == []
    assert len({path.name for path in (tmp_path / "hf").rglob("*.safetensors")}) == 4


def test_calibration_needs_all_weights(fake_hub: FakeHub, sharded: Path) -> None:
    fake_hub.publish("org/name", sharded)

    def never(source: Path) -> Any:
        raise AssertionError

    with pytest.raises(OptionError, match="calibration reads all weights several times; use it without low_disk"):
        hub.convert("org/name", low_disk=True, calibration=never)
    assert fake_hub.traffic == []


def test_local_checkpoints_have_nothing_to_download(checkpoint: Path, tmp_path: Path) -> None:
    place = hub.resolve(checkpoint, low_disk=True)
    assert hub.resolve(checkpoint) == place
    assert (checkpoint / "model.safetensors").exists()


def test_too_little_disk(fake_hub: FakeHub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.publish("org/name", sharded)
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="but only 200 kB is free there; NPQWEN_CACHE can name another place"):
        hub.resolve("org/name", low_disk=True)
    assert not [name for name in fake_hub.downloads if name.endswith("safetensors")]
