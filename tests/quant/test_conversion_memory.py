"""The memory that a conversion takes: as much for large matrices as for small ones, from every kind of source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, shapes

from npqwen.format.safetensors import make_header, tensor_bytes

HIDDEN, INNER = 1024, 40_000
GROUP = 128

MOST = 64e6
"""Bytes by which a process may grow with matrices of 164 MB in float32 (docs/architecture.md)."""
PACKED = HIDDEN * INNER // 2
"""Bytes of a matrix of 4 bits. Of GPTQ and AWQ, which store matrices transposed, three are in memory at a time, and one
is being read."""

Stored = dict[str, tuple[str, tuple[int, ...]]]
"""Of a module: dtypes and shapes of its tensors, by the last parts of their names."""


def plain(rows: int, columns: int) -> Stored:
    return {"weight": ("BF16", (rows, columns))}


def single(rows: int, columns: int) -> Stored:
    return {"weight": ("F32", (rows, columns))}


def fp8(rows: int, columns: int) -> Stored:
    return {
        "weight": ("F8_E4M3", (rows, columns)),
        "weight_scale_inv": ("BF16", (-(-rows // 128), -(-columns // 128))),
    }


def gptq(rows: int, columns: int) -> Stored:
    groups = -(-columns // GROUP)
    return {
        "qweight": ("I32", (columns // 8, rows)),
        "qzeros": ("I32", (groups, rows // 8)),
        "scales": ("F16", (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


def awq(rows: int, columns: int) -> Stored:
    groups = columns // 64
    return {
        "qweight": ("I32", (columns, rows // 8)),
        "qzeros": ("I32", (groups, rows // 8)),
        "scales": ("F16", (groups, rows)),
    }


def compressed(rows: int, columns: int) -> Stored:
    return {
        "weight_packed": ("I32", (rows, columns // 8)),
        "weight_scale": ("BF16", (rows, columns // 64)),
        "weight_shape": ("I64", (2,)),
    }


def mlx(rows: int, columns: int) -> Stored:
    return {
        "weight": ("U32", (rows, columns // 8)),
        "scales": ("BF16", (rows, columns // 64)),
        "biases": ("BF16", (rows, columns // 64)),
    }


SOURCES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bf16": (plain, {}),
    "f32": (single, {}),
    "fp8": (fp8, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
    "gptq": (
        gptq,
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}},
    ),
    "awq": (
        awq,
        {
            "quantization_config": {
                "quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True,
            }
        },
    ),
    "compressed-tensors": (
        compressed,
        {
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {
                            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64,
                        },
                    }
                },
            }
        },
    ),
    "mlx": (mlx, {"quantization": {"bits": 4, "group_size": 64}}),
}  # fmt: skip


def write(directory: Path, kind: str, inner: int) -> None:
    """Write a checkpoint of zeros with a large feed-forward part, as a file with a hole."""
    module, entry = SOURCES[kind]
    config = make_config(hidden_size=HIDDEN, intermediate_size=inner, num_hidden_layers=1, vocab_size=64, **entry)
    stored: Stored = {}
    numbers: dict[str, tuple[int, ...]] = {}
    """What is not zero."""
    for name, shape in shapes(config).items():
        if ".mlp." in name:
            of_module = module(*shape)
            stored |= {name.removesuffix("weight") + part: entry for part, entry in of_module.items()}
            numbers[name.removesuffix("weight") + "weight_shape"] = shape
        else:
            stored[name] = ("BF16", shape)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    head = make_header(((name, dtype, shape) for name, (dtype, shape) in stored.items()), {})
    with open(directory / "model.safetensors", "wb") as file:
        file.write(head)
        end = len(head)
        for name, (dtype, of) in stored.items():
            if dtype == "I64":
                file.seek(end)
                file.write(np.array(numbers[name], "<i8").tobytes())
            end += tensor_bytes(dtype, of)
        file.truncate(end)


CODE = """
import resource, sys
from pathlib import Path
from npqwen_quant import Shards, convert, convert_shards
place, bits, low_disk = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
def run(name):
    out = place / f"{name} converted"
    if low_disk:
        files = {path.name: path.stat().st_size for path in (place / name).glob("*.safetensors")}
        shards = Shards("key", files, lambda shard, directory: place / name / shard)
        convert_shards(place / name, out, shards, bits, threads=2)
    else:
        convert(place / name, out, bits, threads=2)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
run("small")
before = peak()
run("large")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no peak of memory to ask for")
@pytest.mark.parametrize(
    ("kind", "bits", "low_disk"),
    [(kind, 16, False) for kind in SOURCES] + [("bf16", 4, False), ("bf16", 16, True), ("fp8", 16, True)],
)
def test_memory_does_not_grow_with_the_matrices(tmp_path: Path, kind: str, bits: int, low_disk: bool) -> None:
    write(tmp_path / "small", kind, 256)
    write(tmp_path / "large", kind, INNER)
    command = [sys.executable, "-c", CODE, str(tmp_path), str(bits), str(low_disk)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < MOST + (4 * PACKED if kind in ("gptq", "awq") else 0)
