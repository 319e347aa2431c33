"""Checkpoints that cannot be converted: foreign, incomplete, damaged or hostile."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, random_tensors, write_checkpoint, write_safetensors
from npqwen_quant import convert

from npqwen.errors import CheckpointError, ModelNotFoundError


def change(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory: Path, name: str, values: np.ndarray | None) -> None:
    """Replace, add or (None) remove a tensor of an unsharded checkpoint."""
    tensors = random_tensors(json.loads((directory / "config.json").read_text()))
    tensors |= {} if values is None else {name: values}
    if values is None:
        del tensors[name]
    write_safetensors(directory / "model.safetensors", tensors)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": (lambda d: change(d, model_type="llama"), "llama"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "a converted model": (lambda d: change(d, quantization_config={"quant_method": "npqwen"}), "already"),
    "a pointer": (
        lambda d: (d / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        "model.safetensors is a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
    "bitsandbytes": (
        lambda d: change(d, quantization_config={"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "int4"}),
        r"quantized already \(bitsandbytes, int4\)",
    ),
    "aqlm": (lambda d: change(d, quantization_config={"quant_method": "aqlm"}), "aqlm"),
    "missing tensor": (lambda d: rewrite(d, K_PROJ, None), K_PROJ),
    "missing norm": (lambda d: rewrite(d, "model.norm.weight", None), "model.norm.weight"),
    "missing lm_head": (lambda d: change(d, tie_word_embeddings=False), "no lm_head.weight.*tie_word"),
    "wrong shape": (
        lambda d: change(d, intermediate_size=99),
        r"gate_proj.weight has shape \[100, 72\], .* \[99, 72\]",
    ),
    "transposed": (lambda d: rewrite(d, K_PROJ, np.ones((72, 64), np.float32)), rf"{K_PROJ} has shape"),
    "fewer layers": (lambda d: change(d, num_hidden_layers=1), r"model\.layers\.1\."),
    "a thousand million layers": (lambda d: change(d, num_hidden_layers=2 * 10**9), "too few for the layers"),
    "a thousand million experts": (
        lambda d: change(d, model_type="qwen3_moe", num_experts=2 * 10**9),
        "too few for the layers and experts",
    ),
    "unknown tensor": (
        lambda d: rewrite(d, "model.layers.0.self_attn.q_proj.bias", np.ones(128, np.float32)),
        "bias",
    ),
    "integers": (lambda d: rewrite(d, K_PROJ, np.ones((64, 72), np.int64)), f"{K_PROJ} is stored as I64"),
    "float8": (lambda d: rewrite(d, K_PROJ, np.ones((64, 72), np.uint8)), f"{K_PROJ} is stored as F8_E4M3"),
    "nan": (lambda d: rewrite(d, K_PROJ, np.full((64, 72), np.nan, np.float32)), f"{K_PROJ} holds NaN"),
    "infinity": (lambda d: rewrite(d, K_PROJ, np.full((64, 72), -np.inf, np.float32)), f"{K_PROJ} holds NaN"),
    "nan norm": (
        lambda d: rewrite(d, "model.norm.weight", np.full(72, np.nan, np.float32)),
        "model.norm.weight holds NaN",
    ),
}


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_checkpoints(tmp_path: Path, bits: int, case: str) -> None:
    damage, message = REFUSED[case]
    write_checkpoint(tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path / "in", tmp_path / "out", bits)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_one_weight_in_many(tmp_path: Path, bits: int) -> None:
    """The last weight of a padded, interleaved matrix, alone."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = random_tensors(make_config())
    tensors[name][-1, -1] = np.inf
    write_checkpoint(tmp_path / "in", tensors=tensors)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        convert(tmp_path / "in", tmp_path / "out", bits)


def test_a_weight_too_large_for_bf16(tmp_path: Path) -> None:
    tensors = random_tensors(make_config(), "F32")
    tensors[K_PROJ][3, 4] = 3.4e38
    write_checkpoint(tmp_path / "in", tensors=tensors, dtype="F32")
    with pytest.raises(CheckpointError, match=f"{K_PROJ} has a weight .*too large"):
        convert(tmp_path / "in", tmp_path / "out", 16)
    assert os.listdir(tmp_path) == ["in"]


def test_refused_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", shards=3)
    index = tmp_path / "in" / "model.safetensors.index.json"
    second = tmp_path / "in" / "model-00002-of-00003.safetensors"
    moved = second.rename(tmp_path / "in" / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        convert(tmp_path / "in", tmp_path / "out")
    shutil.copy(tmp_path / "in" / "model-00001-of-00003.safetensors", second)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors has no tensor"):
        convert(tmp_path / "in", tmp_path / "out")
    moved.replace(second)
    whole = index.read_text()
    for bad in ("../in/model-00002-of-00003.safetensors", "/etc/passwd", "..", "C:model", "a\\b", "", "x" * 256):
        raw = json.loads(whole)
        raw["weight_map"][K_PROJ] = bad
        index.write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match="not a file name"):
            convert(tmp_path / "in", tmp_path / "out")
    for bad in ("", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', whole[:-9]):
        index.write_text(bad)
        with pytest.raises(CheckpointError, match="index"):
            convert(tmp_path / "in", tmp_path / "out")
    index.write_text(whole)
    convert(tmp_path / "in", tmp_path / "out")


def hostile(edit: Callable[[dict[str, Any]], object]) -> bytes:
    """A file of two tensors whose header `edit` has changed."""
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
    text = edit(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


GOOD = hostile(lambda h: None)
HOSTILE = {
    "empty": b"",
    "short": b"\x05\0\0",
    "header longer than the file": struct.pack("<Q", 10**6) + GOOD[8:],
    "huge header": struct.pack("<Q", 2**64 - 1) + GOOD[8:],
    "header of nothing": struct.pack("<Q", 0) + GOOD[8:],
    "truncated data": GOOD[:-1],
    "data after the end": GOOD + b"\0",
    "not json": hostile(lambda h: b"{" * 60),
    "deep json": hostile(lambda h: b'{"a":' + b"[" * 100_000),
    "huge number": hostile(lambda h: b'{"a":' + b"9" * 10_000 + b"}"),
    "not utf-8": hostile(lambda h: b'{"\xff": {}}'),
    "a list": hostile(lambda h: b"[1, 2]"),
    "entry is a list": hostile(lambda h: h.update(a=[1])),
    "no dtype": hostile(lambda h: h["a"].pop("dtype")),
    "no shape": hostile(lambda h: h["a"].pop("shape")),
    "negative shape": hostile(lambda h: h["a"].update(shape=[-2, -2])),
    "fractional shape": hostile(lambda h: h["a"].update(shape=[2.0, 2])),
    "boolean shape": hostile(lambda h: h["a"].update(shape=[True, 4])),
    "huge shape": hostile(lambda h: h["a"].update(shape=[2**40, 2**40])),
    "wrong size": hostile(lambda h: h["a"].update(shape=[2, 3])),
    "one offset": hostile(lambda h: h["a"].update(data_offsets=[0])),
    "offsets beyond the end": hostile(lambda h: h["b"].update(data_offsets=[16, 2**62])),
    "offsets backwards": hostile(lambda h: h["b"].update(data_offsets=[24, 16])),
    "overlap": hostile(lambda h: h["b"].update(data_offsets=[8, 16])),
    "same place": hostile(lambda h: h.update(c=h["b"])),
    "hole": hostile(lambda h: h.pop("a")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_files(tmp_path: Path, case: str) -> None:
    write_checkpoint(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        convert(tmp_path / "in", tmp_path / "out")


def test_the_hostile_files_are_hostile(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"no tensor model\.embed_tokens\.weight"):
        convert(tmp_path / "in", tmp_path / "out")


def test_source_cut_while_it_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    with pytest.raises(CheckpointError, match="shorter"):
        convert(tmp_path / "in", tmp_path / "out", progress=lambda done, total: os.truncate(file, 4000))
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_source_overwritten_while_it_is_read(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "in", make_config(vocab_size=4128), tokenizer=True)
    file = tmp_path / "in" / name

    def overwrite(done: int, total: int) -> None:
        if done == total:
            data = file.read_bytes()
            file.write_bytes(bytes(len(data)))
            os.utime(file, ns=(1, 1))

    with pytest.raises(CheckpointError, match=f"{name} changed while it was converted; convert the checkpoint again"):
        convert(tmp_path / "in", tmp_path / "out", progress=overwrite)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.skipif(sys.platform == "win32", reason="devices and pipes of POSIX")
@pytest.mark.parametrize("kind", ["/dev/zero", "pipe", "directory"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_files_that_are_not_regular(tmp_path: Path, name: str, kind: str) -> None:
    write_checkpoint(tmp_path / "in", shards=2 if "index" in name else 1)
    file = tmp_path / "in" / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(kind)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is not a regular file"):
        convert(tmp_path / "in", tmp_path / "out")


def test_files_that_are_too_large(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    os.truncate(tmp_path / "in" / "config.json", 10**10)  # sparse
    with pytest.raises(CheckpointError, match=r"it is larger than (16|50|100) MB"):
        convert(tmp_path / "in", tmp_path / "out")
    write_checkpoint(tmp_path / "in")
    (tmp_path / "in" / "README.md").touch()
    os.truncate(tmp_path / "in" / "README.md", 200_000_000)
    with pytest.raises(CheckpointError, match=r"README\.md cannot be read: it is larger than (16|50|100) MB"):
        convert(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
@pytest.mark.parametrize("name", ["README.md", "vocab.json"])
def test_what_is_only_copied_is_not_copied_from_elsewhere(tmp_path: Path, name: str) -> None:
    """Links out of the directory could publish a file of the user; those of the hub's cache lead to its blobs."""
    source = tmp_path / "hub" / "snapshots" / "1234"
    write_checkpoint(source)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "abcd").write_text("of the hub")
    for target, copied in (("secret", False), ("hub/blobs/abcd", True)):
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(tmp_path / target)
        convert(source, tmp_path / f"from {Path(target).name}")
        assert (tmp_path / f"from {Path(target).name}" / name).exists() == copied


def test_messages_about_hostile_files_are_short(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    long = "x" * 1_000_000
    edits: list[Callable[[Path], object]] = [
        lambda d: change(d, model_type=long),
        lambda d: change(d, quantization_config={"quant_method": long}),
        lambda d: change(d, rope_scaling=[long]),
        lambda d: rewrite(d, long, np.ones(3, np.float32)),
    ]
    for edit in edits:
        shutil.rmtree(tmp_path / "in")
        write_checkpoint(tmp_path / "in")
        edit(tmp_path / "in")
        with pytest.raises(CheckpointError) as caught:
            convert(tmp_path / "in", tmp_path / "out")
        assert len(str(caught.value)) < 500


def test_source_is_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out")
