"""Quantized checkpoints converted shard by shard, with weights in one shard and their scales in another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, make_config, random_tensors, write_safetensors
from npqwen_quant import Shards, convert, convert_shards
from quantizers import Quantizer, awq, bitsandbytes, fp8, gptq, mlx, nvfp4, write_quantized

from npqwen.errors import CheckpointError

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 24]}
FORMATS: dict[str, tuple[dict[str, Any], Quantizer]] = {
    "fp8": ({"quantization_config": FP8}, partial(fp8, block=(16, 24))),
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}},
        partial(gptq, act_order=True),
    ),
    "awq": (
        {
            "quantization_config": {
                "quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True,
            }
        },
        awq,
    ),
    "modelopt": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        partial(nvfp4, divides=False),
    ),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
        partial(bitsandbytes, double=True),
    ),
    "mlx": ({"quantization": {"bits": 4, "group_size": 8}}, mlx),
}  # fmt: skip
SIZES = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}


def write(
    directory: Path,
    kind: str,
    shard_of: Callable[[str], int],
    more: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> None:
    """Write a checkpoint whose tensors lie in the shards that a function tells, by number.

    more: further tensors, as they are stored.
    """
    entry, quantizer = FORMATS[kind]
    config = make_config(**(SIZES | entry | changes))
    write_quantized(directory, config, random_tensors(config), quantizer)
    with open(directory / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    dtypes = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    stored = read_stored(directory / "model.safetensors", dtypes)
    stored |= more or {}
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-{shard_of(name)}.safetensors" for name in stored}
    for shard in set(weight_map.values()):
        of_shard = {name: stored[name] for name in stored if weight_map[name] == shard}
        write_safetensors(directory / shard, of_shard, "F32")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read_stored(path: Path, dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """Tensors as write_safetensors takes them."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    numpy = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F8_E4M3": "u1", "U8": "V1"}
    numpy |= {"I32": "<i4", "U32": "<u4", "I64": "<i8"}
    found = {}
    for name, dtype in dtypes.items():
        first, last = (start + offset for offset in header[name]["data_offsets"])
        found[name] = np.frombuffer(raw[first:last], numpy[dtype]).reshape(header[name]["shape"])
    return found


class Remote:
    """Shards elsewhere, which are fetched into a directory."""

    def __init__(self, directory: Path) -> None:
        self.there = directory.with_name(f"{directory.name} there")
        self.there.mkdir()
        for path in directory.glob("*.safetensors"):
            path.rename(self.there / path.name)
        self.fetched: list[str] = []
        self.shards = Shards("1", {path.name: path.stat().st_size for path in self.there.iterdir()}, self.fetch)

    def fetch(self, name: str, place: Path) -> Path:
        if not (place / name).exists():
            self.fetched.append(name)
            assert not [*place.glob("*.safetensors")]  # one at a time
            shutil.copyfile(self.there / name, place / name)
        return place / name


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def scales_last(name: str) -> int:
    return 1 if name.endswith(("weight", "qweight")) else 2


def scales_first(name: str) -> int:
    return 3 - scales_last(name)


def everywhere(name: str) -> int:
    return sum(name.encode()) % 5


def border(name: str) -> int:
    """As a border that cuts between the weights and scales of one matrix."""
    kept = "model.layers.0.self_attn.k_proj."
    return 1 if name < kept + "weight_scale_inv" else 2


@pytest.mark.parametrize("shard_of", [scales_last, scales_first, everywhere, border])
@pytest.mark.parametrize("kind", FORMATS)
def test_parts_of_a_tensor_may_lie_in_several_shards(
    tmp_path: Path, kind: str, shard_of: Callable[[str], int]
) -> None:
    write(tmp_path / "in", kind, shard_of)
    convert(tmp_path / "in", tmp_path / "want")
    remote = Remote(tmp_path / "in")
    convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "in there", "out", "want"]


def test_a_mixture_in_fp8(tmp_path: Path) -> None:
    write(tmp_path / "in", "fp8", everywhere, **MIXTURE)
    convert(tmp_path / "in", tmp_path / "want", 3, shard_bytes=30_000)
    convert_shards(tmp_path / "in", tmp_path / "out", Remote(tmp_path / "in").shards, 3, shard_bytes=30_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_an_output_matrix_that_is_not_used(tmp_path: Path) -> None:
    """A model with tied embeddings may store a quantized lm_head, too."""
    entry, quantizer = FORMATS["gptq"]
    config = make_config(**(SIZES | entry | {"tie_word_embeddings": True}))
    tensors = random_tensors(config)
    parts = quantizer(tensors["model.embed_tokens.weight"])[0]
    head = {f"lm_head.{kind}": values for kind, values in parts.items()}
    write(tmp_path / "in", "gptq", everywhere, tie_word_embeddings=True, more=head)
    convert(tmp_path / "in", tmp_path / "want")
    convert_shards(tmp_path / "in", tmp_path / "out", Remote(tmp_path / "in").shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_only_what_the_border_cuts_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "in", "fp8", border)
    remote = Remote(tmp_path / "in")
    kept: dict[str, list[str]] = {}

    def look(done: int, total: int) -> None:
        for path in tmp_path.glob(".out.partial-*/kept-*"):
            kept[path.name] = list(read_safetensors_names(path))

    convert_shards(tmp_path / "in", tmp_path / "out", remote.shards, progress=look)
    assert kept == {"kept-model-1.safetensors": ["model.layers.0.self_attn.k_proj.weight"]}


def read_safetensors_names(path: Path) -> list[str]:
    raw = path.read_bytes()
    return sorted(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).keys() - {"__metadata__"})


@pytest.mark.parametrize("at", [1, 6, 12, 20, 28, 36])
def test_an_interrupted_conversion_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr("npqwen_quant.writer.SYNC_BYTES", 5000)
    write(tmp_path / "in", "fp8", everywhere)
    convert(tmp_path / "in", tmp_path / "want")
    remote = Remote(tmp_path / "in")
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_shards(tmp_path / "in", tmp_path / "out", remote.shards, progress=interrupt)
    convert_shards(tmp_path / "in", tmp_path / "out", remote.shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert remote.fetched == sorted(remote.shards.files)


def test_scales_that_no_shard_has(tmp_path: Path) -> None:
    write(tmp_path / "in", "fp8", border)
    index = tmp_path / "in" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.layers.0.self_attn.k_proj.weight_scale_inv"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="without its scales"):
        convert_shards(tmp_path / "in", tmp_path / "out", Remote(tmp_path / "in").shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "in there"]
