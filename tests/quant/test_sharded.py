"""Conversions shard by shard: equal to ordinary ones, in little room, resumed after every kind of end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, random_tensors, write_checkpoint, write_safetensors
from npqwen_quant import Shards, convert, convert_shards
from npqwen_quant.plan import plan
from npqwen_quant.steps import deal, pieces, places, steps

from npqwen.errors import CheckpointError, OutputError
from npqwen.format.config import Config
from npqwen.format.recipe import recipe_of
from npqwen.format.safetensors import read_header

MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}


class Remote:
    """A checkpoint whose weights are elsewhere: `shards` fetches them into a directory and counts."""

    def __init__(self, directory: Path, *, key: str = "1") -> None:
        self.there = directory.with_name(f"{directory.name} there")
        self.there.mkdir()
        for path in directory.glob("*.safetensors"):
            path.rename(self.there / path.name)
        self.fetched: list[str] = []
        self.most = 0
        files = {path.name: path.stat().st_size for path in self.there.iterdir()}
        self.shards = Shards(key, files, self.fetch)

    def fetch(self, name: str, directory: Path) -> Path:
        place = directory / name
        if not place.exists():
            self.fetched.append(name)
            shutil.copyfile(self.there / name, place)
        self.most = max(self.most, sum((directory / file).exists() for file in self.shards.files))
        return place


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize("shard_bytes", [20_000, 4_000_000_000])
@pytest.mark.parametrize("mixture", [False, True])
def test_the_result_is_that_of_an_ordinary_conversion(
    tmp_path: Path, bits: int, shards: int, shard_bytes: int, mixture: bool
) -> None:
    """Borders of shards divide q from k, gate from up, and a layer's experts."""
    config = make_config(tie_word_embeddings=False, **(MOE if mixture else {}))
    write_checkpoint(tmp_path / "in", config, shards=shards, tokenizer=True)
    convert(tmp_path / "in", tmp_path / "want", bits, shard_bytes=shard_bytes)
    remote = Remote(tmp_path / "in")
    progress: list[tuple[int, int]] = []
    convert_shards(
        tmp_path / "in",
        tmp_path / "out",
        remote.shards,
        bits,
        shard_bytes=shard_bytes,
        progress=lambda *state: progress.append(state),
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert remote.fetched == sorted(remote.shards.files)
    assert remote.most == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert progress == sorted(progress)
    assert progress[0][0] == 0
    assert progress[-1][0] == progress[-1][1] == sum(remote.shards.files.values())


def test_any_order_of_tensors(tmp_path: Path) -> None:
    """Each shard gets tensors from everywhere: as many matrices as possible are made from two shards."""
    tensors = random_tensors(make_config())
    names = np.random.default_rng(0).permutation(list(tensors))
    write_checkpoint(tmp_path / "in", tensors={name: tensors[name] for name in names}, shards=4)
    convert(tmp_path / "in", tmp_path / "want")
    convert_shards(tmp_path / "in", tmp_path / "out", Remote(tmp_path / "in").shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_a_single_file_beside_an_old_index_and_its_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", tensors=random_tensors(make_config(), seed=1), shards=2)
    write_checkpoint(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "in" / "model.safetensors")
    convert(tmp_path / "in", tmp_path / "want")
    remote = Remote(tmp_path / "in")
    convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert remote.fetched == ["model.safetensors"]


@pytest.mark.parametrize("shards", [1, 3])
def test_names_of_a_bare_base_model(tmp_path: Path, shards: int) -> None:
    tensors = {name.removeprefix("model."): values for name, values in random_tensors(make_config()).items()}
    write_checkpoint(tmp_path / "in", tensors=tensors, shards=shards)
    convert(tmp_path / "in", tmp_path / "want")
    convert_shards(tmp_path / "in", tmp_path / "out", Remote(tmp_path / "in").shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def interrupted_at(n: int) -> Callable[[int, int], None]:
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == n:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("at", [1, 4, 12, 20, 24])
def test_an_interrupted_conversion_is_resumed(tmp_path: Path, at: int) -> None:
    write_checkpoint(tmp_path / "in", shards=3)
    convert(tmp_path / "in", tmp_path / "want")
    remote = Remote(tmp_path / "in")
    with pytest.raises(KeyboardInterrupt):
        convert_shards(tmp_path / "in", tmp_path / "out", remote.shards, progress=interrupted_at(at))
    assert not (tmp_path / "out").exists()
    convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert remote.fetched == sorted(remote.shards.files)  # each once: what was fetched is still there


def test_bytes_of_an_unfinished_shard_are_written_again(tmp_path: Path) -> None:
    """As after a power failure: whatever the shard that is not in state.json has left is overwritten."""
    write_checkpoint(tmp_path / "in", shards=3)
    convert(tmp_path / "in", tmp_path / "want")
    remote = Remote(tmp_path / "in")
    first, *_ = sorted(remote.shards.files)

    def stop(done: int, total: int) -> None:
        if done > remote.shards.files[first]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_shards(tmp_path / "in", tmp_path / "out", remote.shards, progress=stop)
    (place,) = tmp_path.glob(".out.partial-*")
    assert not (place / "source" / first).exists()
    made = place / "output" / "model.safetensors"
    data = bytearray(made.read_bytes())
    want = (tmp_path / "want" / "model.safetensors").read_bytes()
    data += bytes(len(want) - len(data))
    for i, (ours, theirs) in enumerate(zip(data, want, strict=True)):
        if ours != theirs:  # not converted yet
            data[i] = ours ^ 0x55
    made.write_bytes(data)
    convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_other_weights_or_bits_start_anew(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", shards=3)
    convert(tmp_path / "in", tmp_path / "want", 8)
    remote = Remote(tmp_path / "in")
    for shards, bits in ((Shards("0", remote.shards.files, remote.fetch), 8), (remote.shards, 4)):
        with pytest.raises(KeyboardInterrupt):
            convert_shards(tmp_path / "in", tmp_path / "out", shards, bits, progress=interrupted_at(20))
    convert_shards(tmp_path / "in", tmp_path / "out", remote.shards, 8)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_shards_that_lie_elsewhere_stay(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", shards=2)
    remote = Remote(tmp_path / "in")
    shards = Shards("1", remote.shards.files, lambda name, place: remote.there / name)
    before = contents(remote.there)
    convert_shards(tmp_path / "in", tmp_path / "out", shards)
    assert contents(remote.there) == before


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("truncated", "damaged or truncated"),
        ("nan", "NaN or infinity"),
        ("shape", "has shape"),
        ("absent", "has no tensor"),
        ("dtype", "only BF16, F16 and F32"),
    ],
)
def test_broken_shards(tmp_path: Path, broken: str, message: str) -> None:
    tensors = write_checkpoint(tmp_path / "in", shards=2)
    remote = Remote(tmp_path / "in")
    last = sorted(remote.shards.files)[-1]
    path = remote.there / last
    map_ = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())["weight_map"]
    own = {name: tensors[name] for name, file in map_.items() if file == last}
    name = "model.norm.weight"
    if broken == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        values = {
            "nan": own[name] * np.nan,
            "shape": own[name][:-1],
            "dtype": own[name].astype(np.int64),
            "absent": None,
        }[broken]
        own = {key: value for key, value in (own | {name: values}).items() if value is not None}
        write_safetensors(path, own)
    with pytest.raises(CheckpointError, match=message):
        convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_wrong_indexes_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", shards=2)
    remote = Remote(tmp_path / "in")
    index = tmp_path / "in" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    one = sorted(remote.shards.files)[0]
    changes = {
        "has no tensor model.norm.weight": {"model.norm.weight": None},
        "which no Qwen3 model": {"model.layers.0.self_attn.q_proj.lora_A.weight": one},
        "quantized already": {"model.layers.0.self_attn.q_proj.scales": one},
        "is missing, a shard": {"model.norm.weight": "other.safetensors"},
    }
    for message, change in changes.items():
        changed = {name: file for name, file in (raw["weight_map"] | change).items() if file is not None}
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(CheckpointError, match=message):
            convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)
    index.unlink()
    with pytest.raises(CheckpointError, match="would name the shard"):
        convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)
    assert remote.fetched == []


@pytest.mark.parametrize("shards", [1, 3])
def test_a_full_disk_is_noticed_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    write_checkpoint(tmp_path / "in", shards=shards)
    remote = Remote(tmp_path / "in")
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="is free there"):
        convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)
    assert remote.fetched == []


def test_two_processes_do_not_share_the_work(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", shards=2)
    remote = Remote(tmp_path / "in")

    def second(done: int, total: int) -> None:
        if done:
            return
        with pytest.raises(OutputError, match="being converted by another process"):
            convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)

    convert_shards(tmp_path / "in", tmp_path / "out", remote.shards, progress=second)
    assert (tmp_path / "out" / "config.json").exists()


def test_steps_cover_every_byte_in_order(tmp_path: Path) -> None:
    """Their places are compared with the offsets in the header of a file."""
    write_checkpoint(tmp_path / "in", make_config(**MOE))
    convert(tmp_path / "in", tmp_path / "out", 4)
    path = tmp_path / "out" / "model.safetensors"
    with open(path, "rb") as opened:
        stored = read_header(opened).tensors
    files = deal(plan(Config.from_dict(make_config(**MOE)), recipe_of(4)), 10**12)
    assert {name: (place.offset, place.nbytes) for name, place in places(files).items()} == {
        name: (tensor.offset, tensor.nbytes) for name, tensor in stored.items()
    }
    covered = [(step.offset, step.offset + step.nbytes) for step in steps(pieces(files))]
    assert covered[0][0] == 0
    assert [end for _, end in covered[:-1]] == [start for start, _ in covered[1:]]
    assert covered[-1][1] == path.stat().st_size
