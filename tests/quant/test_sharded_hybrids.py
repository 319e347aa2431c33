"""Hybrids converted shard by shard: several of npqwen's tensors are made from one of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import read_safetensors, write_checkpoint
from hybrids import hybrid_checkpoint
from npqwen_quant import convert, convert_shards
from test_sharded import Remote, contents

from npqwen.errors import CheckpointError


def in_shards(name: str, place: Path, shards: int, without: str = "") -> Path:
    """A hybrid's checkpoint in several files. without: the name of a tensor that is left out."""
    one = hybrid_checkpoint(name, place / "one")
    tensors = read_safetensors(one / "model.safetensors")
    tensors.pop(without, None)
    config = json.loads((one / "config.json").read_text())
    write_checkpoint(place / "in", config, tensors, shards=shards, tokenizer=True)
    return place / "in"


@pytest.mark.parametrize("shards", [1, 3, 7])
@pytest.mark.parametrize("name", ["next+draft", "qwen35", "qwen35-moe+draft", "mtp"])
def test_the_result_is_that_of_an_ordinary_conversion(tmp_path: Path, name: str, shards: int) -> None:
    source = in_shards(name, tmp_path, shards)
    convert(source, tmp_path / "want", 4)
    convert_shards(source, tmp_path / "out", Remote(source).shards, 4)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


@pytest.mark.parametrize(
    ("name", "missing", "reported"),
    [
        ("mtp", "mtp.norm.weight", "mtp.norm.weight"),
        ("mtp", "mtp.layers.0.self_attn.q_proj.weight", "mtp.layers.0.self_attn.q_proj.weight"),
        ("mtp", "model.layers.0.linear_attn.in_proj_z.weight", "model.layers.0.linear_attn.in_proj_z.weight"),
        ("next", "model.layers.1.linear_attn.A_log", "model.layers.1.linear_attn.decay"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str, missing: str, reported: str) -> None:
    source = in_shards(name, tmp_path, 3, without=missing)
    with pytest.raises(CheckpointError, match=f"has no tensor {reported}"):
        convert_shards(source, tmp_path / "out", Remote(source).shards, 4)
    assert not (tmp_path / "out").exists()
