"""Mixtures with all experts of a layer in one tensor, converted shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, make_config, random_tensors, read_safetensors, to_bf16, write_checkpoint
from hybrids import hybrid_checkpoint
from npqwen_quant import Shards, convert, convert_shards
from quantizers import mlx
from stacked_experts import fused, stacked

from npqwen.errors import CheckpointError

Stored = dict[str, np.ndarray]


class Remote:
    """The shards of a checkpoint, elsewhere. most: bytes of them that were on the disk at once, kept tensors included.

    shard_of(name): the number of the shard in which a tensor lies.
    """

    def __init__(self, directory: Path, shard_of: Callable[[str], int]) -> None:
        self.there = directory.with_name(f"{directory.name} there")
        self.there.mkdir()
        raw = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").unlink()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        weight_map = {name: f"model-{shard_of(name)}.safetensors" for name in header}
        for shard in set(weight_map.values()):
            entries = {name: entry for name, entry in header.items() if weight_map[name] == shard}
            self._write(self.there / shard, entries, raw[start:])
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        self.out = directory.with_name("out")
        self.fetched: list[str] = []
        self.most = 0
        files = {path.name: path.stat().st_size for path in self.there.iterdir()}
        self.shards = Shards("1", files, self.fetch)

    @staticmethod
    def _write(path: Path, entries: Mapping[str, Any], data: bytes) -> None:
        parts, at, header = [], 0, {}
        for name, entry in entries.items():
            part = data[slice(*entry["data_offsets"])]
            header[name] = entry | {"data_offsets": [at, at + len(part)]}
            parts.append(part)
            at += len(part)
        head = json.dumps(header).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(parts))

    def fetch(self, name: str, place: Path) -> Path:
        if not (place / name).exists():
            assert not [*place.glob("*.safetensors")]  # one at a time
            self.fetched.append(name)
            shutil.copyfile(self.there / name, place / name)
        self.look(0, 0)
        return place / name

    def look(self, done: int, total: int) -> None:
        (work,) = self.out.parent.glob(".out.partial-*")
        held = [*(work / "source").iterdir(), *work.glob("kept-*")]
        self.most = max(self.most, sum(path.stat().st_size for path in held))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def in_order(name: str) -> int:
    """As the hub's files are: a shard ends somewhere between a layer's tensors."""
    layer = name.partition("layers.")[2].partition(".")[0]
    return int(layer or 0) + (name.endswith("down_proj") or ".mlp.shared_expert" in name)


def gates_first(name: str) -> int:
    return 2 if name.endswith("down_proj") else 1


def gates_last(name: str) -> int:
    return 3 - gates_first(name)


def anywhere(name: str) -> int:
    return sum(name.encode()) % 5


PLACES = (in_order, gates_first, gates_last, anywhere)


def hybrid(place: Path, name: str = "qwen35-moe+draft") -> Path:
    """A checkpoint as those of Qwen3.5's mixtures."""
    directory = hybrid_checkpoint(name, place)
    tensors = fused(read_safetensors(directory / "model.safetensors"))
    config = json.loads((directory / "config.json").read_bytes())
    return written(directory, config, tensors)


def written(directory: Path, config: Mapping[str, Any], tensors: Stored) -> Path:
    write_checkpoint(directory, dict(config), tensors)
    return directory


def of_images(place: Path, inner: int, transposed: bool) -> Path:
    """A checkpoint as those of Qwen3-VL's mixtures, or as transformers saves them anew."""
    config = make_config(**MIXTURE | {"moe_intermediate_size": inner, "tie_word_embeddings": False})
    tensors = fused({name: to_bf16(values) for name, values in random_tensors(config).items()}, transposed)
    tensors = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    tensors["model.visual.patch_embed.proj.weight"] = np.ones((3, 4, 5), np.uint16)
    whole = {"model_type": "qwen3_vl_moe", "text_config": config | {"model_type": "qwen3_vl_moe_text"}}
    return written(place, whole | {"tie_word_embeddings": False}, tensors)


def of_mlx(place: Path, quantized: bool) -> Path:
    """A checkpoint as mlx-lm writes it, in bf16 or in 4 bits."""
    config = make_config(**MIXTURE | {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32})
    tensors: Stored = {}
    for name, values in random_tensors(config).items():
        if quantized and values.ndim == 2:
            parts, _ = mlx(values, group=16)
            tensors |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
        else:
            tensors[name] = to_bf16(values)
    if quantized:
        config |= {"quantization": {"bits": 4, "group_size": 16}}
    return written(place, config, stacked(tensors))


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "hybrid": hybrid,
    "next": partial(hybrid, name="next"),
    "images": partial(of_images, inner=40, transposed=False),
    "images, transposed": partial(of_images, inner=40, transposed=True),
    "square gate and up": partial(of_images, inner=36, transposed=False),
    "square gate and up, transposed": partial(of_images, inner=36, transposed=True),
    "square down": partial(of_images, inner=72, transposed=False),
    "square down, transposed": partial(of_images, inner=72, transposed=True),
    "mlx": partial(of_mlx, quantized=False),
    "mlx, quantized": partial(of_mlx, quantized=True),
}


@pytest.mark.parametrize("shard_of", PLACES)
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_the_result_is_that_of_an_ordinary_conversion(
    tmp_path: Path, case: str, shard_of: Callable[[str], int]
) -> None:
    source = CHECKPOINTS[case](tmp_path / "in")
    convert(source, tmp_path / "want", 4, shard_bytes=50_000)
    remote = Remote(source, shard_of)
    convert_shards(source, tmp_path / "out", remote.shards, 4, shard_bytes=50_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert remote.fetched == sorted(remote.shards.files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "in there", "out", "want"]


@pytest.mark.parametrize("shard_of", PLACES)
def test_the_disk_holds_one_shard(tmp_path: Path, shard_of: Callable[[str], int]) -> None:
    """Nothing is kept: the shape of each tensor tells how it is stored, without the layer's other one."""
    source = of_images(tmp_path / "in", inner=40, transposed=True)
    remote = Remote(source, shard_of)
    convert_shards(source, tmp_path / "out", remote.shards, 4, progress=remote.look)
    assert remote.most == max(remote.shards.files.values())


@pytest.mark.parametrize("case", ["hybrid", "square gate and up", "mlx, quantized"])
@pytest.mark.parametrize("at", [1, 5, 9, 14, 20, 40])
def test_an_interrupted_conversion_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, at: int
) -> None:
    monkeypatch.setattr("npqwen_quant.writer.SYNC_BYTES", 5000)
    source = CHECKPOINTS[case](tmp_path / "in")
    convert(source, tmp_path / "want", 3)
    remote = Remote(source, anywhere)
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_shards(source, tmp_path / "out", remote.shards, 3, progress=interrupt)
    convert_shards(source, tmp_path / "out", remote.shards, 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert remote.fetched == sorted(remote.shards.files)


@pytest.mark.parametrize("case", ["hybrid", "square down", "square gate and up"])
@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_a_missing_tensor_is_named(tmp_path: Path, case: str, part: str) -> None:
    source = CHECKPOINTS[case](tmp_path / "in")
    remote = Remote(source, in_order)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (name,) = (name for name in weight_map if name.endswith(f"layers.1.mlp.experts.{part}"))
    del weight_map[name]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"has no tensor model\.layers\.1\.mlp\.experts\.0|no {part} beside it"):
        convert_shards(source, tmp_path / "out", remote.shards, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "in there"]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (13, r"has shape \[12, 128\], but config.json says \[13, 128\]"),
        (1 << 20, "config.json's num_experts, 1048576, is more than any model has"),
        (1 << 30, "config.json's num_experts, 1073741824, is more than any model has"),
    ],
)
def test_more_experts_than_the_tensors_have_are_refused(tmp_path: Path, experts: int, message: str) -> None:
    source = hybrid(tmp_path / "in")
    config = json.loads((source / "config.json").read_bytes())
    config["text_config"]["num_experts"] = experts
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        convert_shards(source, tmp_path / "out", Remote(source, in_order).shards, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "in there"]
