"""Headers of safetensors files: the parser refuses what the package `safetensors` refuses, and very large ones."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from npqwen.errors import CheckpointError
from npqwen.format.safetensors import DTYPE_BYTES, INDEX, HeaderError, make_header, read_header, read_index


def accepts(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            read_header(file)
    except HeaderError:
        return False
    return True


def package_accepts(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "np"):
            return True
    except safetensors.SafetensorError:
        return False


def test_files_of_the_package_are_read(tmp_path: Path) -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors: dict[str, np.ndarray] = {"a": a, "b": np.zeros((0, 4), np.int64), "c": np.ones(3, bool)}
    safetensors.numpy.save_file(tensors, tmp_path / "x", {"who": "the package"})
    with open(tmp_path / "x", "rb") as file:
        header = read_header(file)
        assert header.metadata == {"who": "the package"}
        assert {name: tensor.shape for name, tensor in header.tensors.items()} == {"a": (2, 3), "b": (0, 4), "c": (3,)}
        file.seek(header.tensors["a"].offset)
        assert np.array_equal(np.fromfile(file, "<f4", 6), a.ravel())


def test_the_package_reads_what_is_written_here(tmp_path: Path) -> None:
    header = make_header([("a", "F16", (2, 3)), ("b", "U8", (5,))], {"format": "x"})
    assert len(header) % 64 == 0
    data = np.arange(6, dtype=np.float16).tobytes() + bytes(range(5))
    (tmp_path / "x").write_bytes(header + data)
    loaded = safetensors.numpy.load_file(tmp_path / "x")
    assert loaded["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["b"].tolist() == [0, 1, 2, 3, 4]


VALUES: list[Any] = [
    0, 1, 2, 3, 4, 8, 16, 20, 24, -1, 2**40, 2**63, 2**64, 1.5, 2.0, True, None, "4", [], [0], [0, 16], [16, 24],
    [8, 16], [16, 16], [24, 16], [0, 24], [2, 2], [4], [2, 3], [1] * 20, [2**62] * 4, [0, 2**62], {},
    "F32", "BF16", "I64", "X",
]  # fmt: skip


def test_random_headers_against_the_package(tmp_path: Path) -> None:
    """Random changes to a good header. More is refused here only in dimensions, less only in unknown dtypes."""
    rng = random.Random(0)
    path = tmp_path / "x"
    verdicts = set()
    for _ in range(2000):
        header: dict[str, Any] = {
            "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
        }
        entry = rng.choice([*header.values(), header])
        entry[rng.choice([*entry, "c"])] = rng.choice(VALUES)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(rng.choice([24, 24, 24, 23, 25])))
        ours, theirs = accepts(path), package_accepts(path)
        verdicts.add(ours)
        if ours != theirs:
            unknown = any(e["dtype"] not in DTYPE_BYTES for e in header.values())
            assert (ours and unknown) or any(len(e["shape"]) > 16 for e in header.values()), header
    assert verdicts == {True, False}


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**64 - 1])
def test_header_lengths(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
    assert not accepts(tmp_path / "x")
    assert not package_accepts(tmp_path / "x")


@pytest.mark.parametrize("text", [b'{"a":[' + b"{}," * 600_000 + b"{}]}", b'{"a":"' + b"x" * 16_000_000 + b'"}'])
def test_headers_that_would_take_much_memory_are_not_parsed(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text)
    with open(tmp_path / "x", "rb", buffering=0) as file, pytest.raises(HeaderError, match=r"too large|would be"):
        read_header(file)


def test_the_index_of_a_large_quantized_mixture(tmp_path: Path) -> None:
    """Every matrix of every expert of Qwen3-Next-80B-A3B in four parts."""
    expected = {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.{part}": f"model-{layer:05d}-of-00048.safetensors"
        for layer in range(48)
        for expert in range(512)
        for matrix in ("gate", "up", "down")
        for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    }
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": expected}, indent=2))
    assert read_index(tmp_path / INDEX) == expected


def test_an_index_that_would_take_much_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": [' + "0," * 600_000 + "0]}")
    with pytest.raises(CheckpointError, match="it has more than 600,000 values"):
        read_index(tmp_path / INDEX)
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(64_000_001)
    with pytest.raises(CheckpointError, match="it is larger than 64 MB"):
        read_index(tmp_path / INDEX)
