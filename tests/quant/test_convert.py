"""Complete conversions, against a NumPy implementation of FORMAT.md."""

from __future__ import annotations

import json
import math
import os
import struct
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from checkpoints import (
    TINY,
    decode,
    from_bf16,
    make_config,
    random_tensors,
    read_safetensors,
    shapes,
    to_bf16,
    write_checkpoint,
)
from fake_system import MOUNTS, tree
from npqwen_quant import conversion, convert
from units import CODEBOOKS, name_of, read_units, row_bytes

from npqwen.errors import OptionError

UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


VOCABULARY = {3: "int5", 4: "int5"}
V_PROJ = {3: "int4", 4: "int6"}
DOWN_PROJ = {3: "int4"}


def recipe(bits: int, name: str) -> str:
    """The encoding of a matrix tensor."""
    if "embed_tokens" in name or "lm_head" in name:
        return VOCABULARY.get(bits, name_of(bits))
    if "v_proj" in name:
        return V_PROJ.get(bits, name_of(bits))
    return DOWN_PROJ.get(bits, name_of(bits)) if "down_proj" in name else name_of(bits)


def padded(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, -rows.shape[0] % 16), (0, -rows.shape[1] % 128)))


def expected(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The converted model's tensors, unquantized: vectors and matrices with their padding."""
    out = {}
    for name, values in tensors.items():
        if values.ndim == 1:
            out[name] = np.pad(values, (0, -len(values) % 16))
        elif not any(part in name for part in ("q_proj", "k_proj", "gate_proj", "up_proj")):
            out[name] = padded(values)
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        qk = [tensors[f"{attention}{part}_proj.weight"] for part in "qk"]
        out[attention + "qk_proj.weight"] = padded(np.concatenate(qk))
        gate, up = (padded(tensors[f"{mlp}{part}_proj.weight"]) for part in ("gate", "up"))
        sixteens = [half[r : r + 16] for r in range(0, len(gate), 16) for half in (gate, up)]
        out[mlp + "gate_up_proj.weight"] = np.concatenate(sixteens)
    return out


def read_model(directory: Path) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        out |= read_safetensors(path)
    return out


def check(directory: Path, tensors: dict[str, np.ndarray], layers: int, bits: int, exact: bool) -> None:
    """Every tensor of a converted model: name, shape, and what its bytes mean."""
    got, want = read_model(directory), expected(tensors, layers)
    codebooks = {name: got.pop(name) for name in list(got) if name.endswith(".codebook")}
    encodings = json.loads((directory / "config.json").read_text("utf-8"))["quantization_config"]["encodings"]
    assert got.keys() == want.keys()
    assert encodings.keys() == {name for name, values in want.items() if values.ndim == 2}
    named = {name.removesuffix("weight") + "codebook" for name in encodings if encodings[name] in CODEBOOKS}
    assert codebooks.keys() == named
    for name, values in want.items():
        if values.ndim == 1:
            assert got[name].dtype == np.float32
            np.testing.assert_array_equal(got[name], values)
            continue
        assert encodings[name] == recipe(bits, name)
        shape = (values.shape[0] // 16, row_bytes(encodings[name], values.shape[1] // 128))
        assert got[name].dtype == np.uint8
        assert got[name].shape == shape
        meant = read_units(
            encodings[name], got[name], codebooks.get(name.removesuffix("weight") + "codebook")
        ).weights
        if bits == 16:
            np.testing.assert_array_equal(meant, values if exact else from_bf16(to_bf16(values)))
            continue
        assert not meant[~values.any(1)].any()
        meant = np.where(values == 0, 0, meant)  # what a block of other weights has for zero
        blocks = np.abs(values).reshape(-1, 32).max(1)
        error = np.abs(meant - values).reshape(-1, 32).max(1)
        # Block scales are 127ths of the row's largest.
        row = np.repeat(np.abs(values).max(1), values.shape[1] // 32)
        assert (error <= blocks * {3: 0.35, 4: 0.18, 8: 0.008}[bits] + row * 0.006).all()
        assert np.square(meant - values).sum() < {3: 0.04, 4: 0.01, 8: 5e-5}[bits] * np.square(values).sum()


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
@pytest.mark.parametrize(
    ("style", "dtype", "shards", "changes"),
    [
        ("hub", "BF16", 1, {}),
        ("v5", "BF16", 3, UNTIED),
        ("hub", "F16", 2, UNTIED),
        ("v5", "F32", 1, {}),
        ("hub", "BF16", 1, {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}),
        ("hub", "BF16", 1, {"hidden_size": 1, "intermediate_size": 1, "vocab_size": 1, "head_dim": 16}),
        ("hub", "F32", 1, {"hidden_size": 65, "intermediate_size": 33, "num_key_value_heads": 1}),
    ],
)
def test_every_tensor(tmp_path: Path, bits: int, style: str, dtype: str, shards: int, changes: dict[str, Any]) -> None:
    config = make_config(style, **changes)
    tensors = write_checkpoint(tmp_path / "in", config, dtype=dtype, shards=shards)
    convert(tmp_path / "in", tmp_path / "out", bits)
    check(tmp_path / "out", tensors, config["num_hidden_layers"], bits, exact=dtype == "BF16")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    model = read_model(tmp_path / "out")
    matrices = [name for name in model if model[name].dtype == np.uint8 and name.endswith(".weight")]
    assert written.pop("quantization_config") == {
        "quant_method": "npqwen",
        "format_version": 2,
        "bits": bits,
        "created_by": f"npqwen {version('npqwen')}",
        "encodings": {name: recipe(bits, name) for name in matrices},
    }
    assert written == config


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_the_example_model(tmp_path: Path, bits: int) -> None:
    convert(TINY, tmp_path / "out", bits, threads=2)
    tensors = {name: decode(data) for name, data in read_safetensors(TINY / "model.safetensors").items()}
    check(tmp_path / "out", tensors, 4, bits, exact=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (TINY / name).read_bytes()
    assert not (tmp_path / "out" / "heldout.txt").exists()


def test_large_matrices_in_slices(tmp_path: Path) -> None:
    """Matrices converted in several tasks, which end within parts of unequal size."""
    config = make_config(hidden_size=2100, intermediate_size=1030, vocab_size=1501, num_hidden_layers=1)
    tensors = write_checkpoint(tmp_path / "in", config)
    convert(tmp_path / "in", tmp_path / "out", 16, threads=3)
    check(tmp_path / "out", tensors, 1, 16, exact=True)
    convert(tmp_path / "in", tmp_path / "int4", 4, threads=3)
    check(tmp_path / "int4", tensors, 1, 4, exact=True)


@pytest.mark.parametrize("shard_bytes", [4_000_000_000, 20_000, 1])
def test_files_are_safetensors_aligned_to_64(tmp_path: Path, shard_bytes: int) -> None:
    config = make_config(**UNTIED)
    tensors = write_checkpoint(tmp_path / "in", config)
    convert(tmp_path / "in", tmp_path / "out", 8, shard_bytes=shard_bytes)
    check(tmp_path / "out", tensors, 2, 8, exact=True)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    order: list[str] = []
    where: dict[str, str] = {}
    for file in files:
        raw = (tmp_path / "out" / file).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        assert (8 + length) % 64 == 0
        header = json.loads(raw[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "npqwen", "format_version": "2"}
        assert all(offset % 64 == 0 for entry in header.values() for offset in entry["data_offsets"])
        size = max(entry["data_offsets"][1] for entry in header.values())
        assert size <= shard_bytes or len(header) == 1
        order += header
        where |= dict.fromkeys(header, file)
        with safetensors.safe_open(tmp_path / "out" / file, "np") as opened:  # the library's own checks
            assert set(opened.keys()) == set(header)
    if shard_bytes == 4_000_000_000:
        assert files == ["model.safetensors"]
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    else:
        assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == where
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in read_model(tmp_path / "out").values())
    layer = "model.layers.0."
    assert order[0] == "model.embed_tokens.weight"
    assert order[1:10] == [
        layer + "input_layernorm.weight",
        layer + "self_attn.qk_proj.weight",
        layer + "self_attn.v_proj.weight",
        layer + "self_attn.q_norm.weight",
        layer + "self_attn.k_norm.weight",
        layer + "self_attn.o_proj.weight",
        layer + "post_attention_layernorm.weight",
        layer + "mlp.gate_up_proj.weight",
        layer + "mlp.down_proj.weight",
    ]
    assert order[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_result_does_not_depend_on_threads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "one", threads=1)
    convert(tmp_path / "in", tmp_path / "four", threads=4)
    one, four = (tmp_path / name / "model.safetensors" for name in ("one", "four"))
    assert one.read_bytes() == four.read_bytes()


def test_progress_counts_the_bytes_of_the_source(tmp_path: Path) -> None:
    config = make_config()
    write_checkpoint(tmp_path / "in", config)
    seen = []
    convert(tmp_path / "in", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    total = sum(2 * math.prod(shape) for shape in shapes(config).values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_names_without_the_model_prefix(tmp_path: Path) -> None:
    tensors = random_tensors(make_config())
    bare = {name.removeprefix("model."): values for name, values in tensors.items()}
    write_checkpoint(tmp_path / "in", make_config(), bare, shards=2)
    convert(tmp_path / "in", tmp_path / "out", 16)
    check(tmp_path / "out", tensors, 2, 16, exact=True)


def test_harmless_extra_tensors_are_left_out(tmp_path: Path) -> None:
    tensors = random_tensors(make_config())
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32),
    }
    write_checkpoint(tmp_path / "in", make_config(), tensors | extra)
    notices: list[str] = []
    convert(tmp_path / "in", tmp_path / "out", 16, notice=notices.append)
    check(tmp_path / "out", tensors, 2, 16, exact=True)
    assert notices == []
    write_checkpoint(tmp_path / "other", make_config(), tensors | {"lm_head.weight": 2 * extra["lm_head.weight"]})
    convert(tmp_path / "other", tmp_path / "tied", 16, notice=notices.append)
    check(tmp_path / "tied", tensors, 2, 16, exact=True)
    assert len(notices) == 1
    assert notices[0].startswith("lm_head.weight is left out, as config.json ties the output to the embedding, but the")


def test_bf16_rounds_to_even(tmp_path: Path) -> None:
    config = make_config()
    tensors = random_tensors(config, "F32")
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000001, 0x7F7F7FFF], np.uint32)
    tensors["model.embed_tokens.weight"][0, :6] = bits.view(np.float32)
    write_checkpoint(tmp_path / "in", config, tensors, dtype="F32")
    convert(tmp_path / "in", tmp_path / "out", 16)
    embedding = read_units("bf16", read_model(tmp_path / "out")["model.embed_tokens.weight"]).weights
    want = np.array([0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000, 0x7F7F], np.uint32) << 16
    np.testing.assert_array_equal(embedding[0, :6].view(np.uint32), want)


def test_paths_that_are_none(tmp_path: Path) -> None:
    for arguments in ((5, tmp_path), (TINY, None), (b"bytes", tmp_path)):
        with pytest.raises(OptionError, match="it must be a string or a Path"):
            convert(*arguments)


@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"bits": 0}, {"bits": "4"}, {"threads": 0}, {"threads": "1"}, {"shard_bytes": 0}]
)
def test_impossible_options(tmp_path: Path, options: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "in")
    with pytest.raises(OptionError, match=next(iter(options))):
        convert(tmp_path / "in", tmp_path / "out", **options)


def test_a_config_with_lone_surrogates(tmp_path: Path) -> None:
    """JSON may escape lone surrogates, which UTF-8 cannot encode."""
    write_checkpoint(tmp_path / "in", make_config(name="half \ud800, whole \u00e9"))
    convert(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["name"] == "half \ud800, whole \u00e9"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux's files")
@pytest.mark.parametrize(
    ("cpus", "quota", "threads"),
    [(8, None, 8), (128, None, 64), (128, "250 100", 2), (8, "50 100", 1), (2, "900 100", 2)],
)
def test_threads_respect_a_container_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: int, quota: str | None, threads: int
) -> None:
    files = {"proc/self/cgroup": "0::/a", "proc/self/mountinfo": MOUNTS}
    files |= {} if quota is None else {"sys/fs/cgroup/unified/a/cpu.max": quota}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    assert conversion.default_threads(tree(tmp_path, files)) == threads
