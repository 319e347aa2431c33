"""Whole conversions, against a NumPy reading of FORMAT.md, and everything that can go wrong on the way."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

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
    write_safetensors,
)
from npqwen_quant import convert
from units import UNIT_BYTES, unpack

from npqwen.errors import CheckpointError, ModelNotFoundError, NpqwenError, OptionError, OutputError

UNITS = {4: "int4", 8: "int8", 16: "bf16"}
UNTIED = {"tie_word_embeddings": False}


def padded(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, -rows.shape[0] % 16), (0, -rows.shape[1] % 64)))


def expected(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The converted model's tensors, unquantized: vectors and matrices with their padding."""
    out = {}
    for name, values in tensors.items():
        if values.ndim == 1:
            out[name] = np.pad(values, (0, -len(values) % 16))
        elif not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            out[name] = padded(values)
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        qkv = [tensors[f"{attention}{part}_proj.weight"] for part in "qkv"]
        out[attention + "qkv_proj.weight"] = padded(np.concatenate(qkv))
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
    assert got.keys() == want.keys()
    for name, values in want.items():
        if values.ndim == 1:
            assert got[name].dtype == np.float32
            np.testing.assert_array_equal(got[name], values)
            continue
        shape = (values.shape[0] // 16, values.shape[1] // 64, UNIT_BYTES[UNITS[bits]])
        assert got[name].dtype == np.uint8
        assert got[name].shape == shape
        meant = unpack(got[name])
        if bits == 16:
            np.testing.assert_array_equal(meant, values if exact else from_bf16(to_bf16(values)))
            continue
        assert not meant[values == 0].any()
        blocks = np.abs(values).reshape(-1, 32).max(1)
        error = np.abs(meant - values).reshape(-1, 32).max(1)
        assert (error <= blocks * {4: 0.18, 8: 0.008}[bits] + 1e-7).all()
        assert np.square(meant - values).sum() < {4: 0.01, 8: 5e-5}[bits] * np.square(values).sum()


@pytest.mark.parametrize("bits", [4, 8, 16])
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
def test_every_tensor(tmp_path, bits, style, dtype, shards, changes):
    config = make_config(style, **changes)
    tensors = write_checkpoint(tmp_path / "in", config, dtype=dtype, shards=shards)
    convert(tmp_path / "in", tmp_path / "out", bits)
    check(tmp_path / "out", tensors, config["num_hidden_layers"], bits, exact=dtype == "BF16")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written.pop("quantization_config") == {
        "quant_method": "npqwen",
        "format_version": 1,
        "bits": bits,
        "created_by": f"npqwen {version('npqwen')}",
    }
    assert written == config


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_example_model(tmp_path, bits):
    convert(TINY, tmp_path / "out", bits, threads=2)
    tensors = {name: decode(data) for name, data in read_safetensors(TINY / "model.safetensors").items()}
    check(tmp_path / "out", tensors, 4, bits, exact=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (TINY / name).read_bytes()
    assert not (tmp_path / "out" / "heldout.txt").exists()


def test_large_matrices_in_slices(tmp_path):
    """Matrices of several slices, whose ends fall between tiles of unequal parts."""
    config = make_config(hidden_size=2100, intermediate_size=1030, vocab_size=1501, num_hidden_layers=1)
    tensors = write_checkpoint(tmp_path / "in", config)
    convert(tmp_path / "in", tmp_path / "out", 16, threads=3)
    check(tmp_path / "out", tensors, 1, 16, exact=True)
    convert(tmp_path / "in", tmp_path / "int4", 4, threads=3)
    check(tmp_path / "int4", tensors, 1, 4, exact=True)


@pytest.mark.parametrize("shard_bytes", [4_000_000_000, 20_000, 1])
def test_files_are_safetensors_aligned_to_64(tmp_path, shard_bytes):
    config = make_config(**UNTIED)
    tensors = write_checkpoint(tmp_path / "in", config)
    convert(tmp_path / "in", tmp_path / "out", 8, shard_bytes=shard_bytes)
    check(tmp_path / "out", tensors, 2, 8, exact=True)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    order, where = [], {}
    for file in files:
        raw = (tmp_path / "out" / file).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        assert (8 + length) % 64 == 0
        header = json.loads(raw[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "npqwen", "format_version": "1"}
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
    assert order[1:9] == [
        layer + "input_layernorm.weight",
        layer + "self_attn.qkv_proj.weight",
        layer + "self_attn.q_norm.weight",
        layer + "self_attn.k_norm.weight",
        layer + "self_attn.o_proj.weight",
        layer + "post_attention_layernorm.weight",
        layer + "mlp.gate_up_proj.weight",
        layer + "mlp.down_proj.weight",
    ]
    assert order[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_result_does_not_depend_on_threads(tmp_path):
    write_checkpoint(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "one", threads=1)
    convert(tmp_path / "in", tmp_path / "four", threads=4)
    one, four = (tmp_path / name / "model.safetensors" for name in ("one", "four"))
    assert one.read_bytes() == four.read_bytes()


def test_progress_counts_the_bytes_of_the_source(tmp_path):
    config = make_config()
    write_checkpoint(tmp_path / "in", config)
    seen = []
    convert(tmp_path / "in", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    total = sum(2 * math.prod(shape) for shape in shapes(config).values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_names_without_the_model_prefix(tmp_path):
    tensors = random_tensors(make_config())
    bare = {name.removeprefix("model."): values for name, values in tensors.items()}
    write_checkpoint(tmp_path / "in", make_config(), bare, shards=2)
    convert(tmp_path / "in", tmp_path / "out", 16)
    check(tmp_path / "out", tensors, 2, 16, exact=True)


def test_harmless_extra_tensors_are_left_out(tmp_path):
    tensors = random_tensors(make_config())
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32),
    }
    write_checkpoint(tmp_path / "in", make_config(), tensors | extra)
    convert(tmp_path / "in", tmp_path / "out", 16)
    check(tmp_path / "out", tensors, 2, 16, exact=True)


def test_bf16_rounds_to_even(tmp_path):
    config = make_config()
    tensors = random_tensors(config, "F32")
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80000001, 0x7F7F7FFF], np.uint32)
    tensors["model.embed_tokens.weight"][0, :6] = bits.view(np.float32)
    write_checkpoint(tmp_path / "in", config, tensors, dtype="F32")
    convert(tmp_path / "in", tmp_path / "out", 16)
    embedding = unpack(read_model(tmp_path / "out")["model.embed_tokens.weight"])
    want = np.array([0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000, 0x7F7F], np.uint32) << 16
    np.testing.assert_array_equal(embedding[0, :6].view(np.uint32), want)


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
REFUSED = {
    "another architecture": (lambda d: change(d, model_type="llama"), "llama"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "a converted model": (lambda d: change(d, quantization_config={"quant_method": "npqwen"}), "already"),
    "fp8": (lambda d: change(d, quantization_config={"quant_method": "fp8"}), "fp8"),
    "gptq": (lambda d: change(d, quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "missing tensor": (lambda d: rewrite(d, K_PROJ, None), K_PROJ),
    "missing norm": (lambda d: rewrite(d, "model.norm.weight", None), "model.norm.weight"),
    "missing lm_head": (lambda d: change(d, tie_word_embeddings=False), "no lm_head.weight.*tie_word"),
    "wrong shape": (
        lambda d: change(d, intermediate_size=99),
        r"gate_proj.weight has shape \[100, 72\], .* \[99, 72\]",
    ),
    "transposed": (lambda d: rewrite(d, K_PROJ, np.ones((72, 64), np.float32)), rf"{K_PROJ} has shape"),
    "fewer layers": (lambda d: change(d, num_hidden_layers=1), r"model\.layers\.1\."),
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
def test_refused_checkpoints(tmp_path, bits, case):
    damage, message = REFUSED[case]
    write_checkpoint(tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path / "in", tmp_path / "out", bits)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_one_weight_in_many(tmp_path, bits):
    """The last weight of a padded, interleaved matrix, alone."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = random_tensors(make_config())
    tensors[name][-1, -1] = np.inf
    write_checkpoint(tmp_path / "in", tensors=tensors)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        convert(tmp_path / "in", tmp_path / "out", bits)


@pytest.mark.parametrize(("bits", "size"), [(4, 6e5), (8, 9e6), (16, 3.4e38)])
def test_weights_too_large_for_the_encoding(tmp_path, bits, size):
    tensors = random_tensors(make_config(), "F32")
    tensors[K_PROJ][3, 4] = size
    write_checkpoint(tmp_path / "in", tensors=tensors, dtype="F32")
    with pytest.raises(CheckpointError, match=f"{K_PROJ} holds a weight .*too large"):
        convert(tmp_path / "in", tmp_path / "out", bits)
    assert os.listdir(tmp_path) == ["in"]


def test_refused_shards(tmp_path):
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
    for bad in ("../in/model-00002-of-00003.safetensors", "/etc/passwd", "..", "C:model", "a\\b", ""):
        raw = json.loads(whole)
        raw["weight_map"][K_PROJ] = bad
        index.write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match="no file name"):
            convert(tmp_path / "in", tmp_path / "out")
    for bad in ("", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', whole[:-9]):
        index.write_text(bad)
        with pytest.raises(CheckpointError, match="index"):
            convert(tmp_path / "in", tmp_path / "out")
    index.write_text(whole)
    convert(tmp_path / "in", tmp_path / "out")


def hostile(edit) -> bytes:
    """A file of two tensors whose header `edit` has changed."""
    header = {
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
def test_damaged_files(tmp_path, case):
    write_checkpoint(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        convert(tmp_path / "in", tmp_path / "out")


def test_the_hostile_files_are_hostile(tmp_path):
    write_checkpoint(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"no tensor model\.embed_tokens\.weight"):
        convert(tmp_path / "in", tmp_path / "out")


def test_source_cut_while_it_is_read(tmp_path):
    write_checkpoint(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    with pytest.raises(CheckpointError, match="shorter"):
        convert(tmp_path / "in", tmp_path / "out", progress=lambda done, total: os.truncate(file, 4000))
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("options", [{"bits": 5}, {"bits": 0}, {"bits": "4"}, {"threads": 0}])
def test_impossible_options(tmp_path, options):
    write_checkpoint(tmp_path / "in")
    with pytest.raises(OptionError, match=next(iter(options))):
        convert(tmp_path / "in", tmp_path / "out", **options)


def test_source_is_no_directory(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_output_and_source_must_lie_apart(tmp_path):
    source = tmp_path / "a" / "in"
    write_checkpoint(source)
    places = [source, source / "out", source / "x" / "y", tmp_path / "a", source / ".." / "in"]
    if sys.platform != "win32":  # where links need a privilege
        (tmp_path / "link").symlink_to(source, target_is_directory=True)
        places += [tmp_path / "link", tmp_path / "link" / "x" / "y"]
    before = sorted(tmp_path.rglob("*"))
    for out in places:
        for force in (False, True):
            with pytest.raises(OutputError, match="choose another place"):
                convert(source, out, force=force)
    assert sorted(tmp_path.rglob("*")) == before


def test_output_exists(tmp_path):
    write_checkpoint(tmp_path / "in")
    out = tmp_path / "deep" / "er" / "out"
    convert(tmp_path / "in", out, 4)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        convert(tmp_path / "in", out, 8)
    with pytest.raises(ZeroDivisionError):
        convert(tmp_path / "in", out, 8, force=True, progress=lambda done, total: 1 // 0)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    convert(tmp_path / "in", out, 8, force=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 8
    assert os.listdir(out.parent) == ["out"]


def test_force_replaces_nothing_but_models(tmp_path):
    write_checkpoint(tmp_path / "in")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name in ("home", "file"):
        with pytest.raises(OutputError, match="exists already"):
            convert(tmp_path / "in", tmp_path / name, force=True)
    assert (tmp_path / "home" / "thesis").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "in", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_output_appears_in_the_meantime(tmp_path):
    write_checkpoint(tmp_path / "in")

    def intrude(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("")

    with pytest.raises(OutputError, match="exists already"):
        convert(tmp_path / "in", tmp_path / "out", progress=intrude)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]


def test_no_room_is_seen_before_the_start(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 50_000, 50_000))
    with pytest.raises(OutputError, match=r"would take .* GB, but only 0.00 GB is free"):
        convert(tmp_path / "in", tmp_path / "out", progress=lambda done, total: pytest.fail("started"))
    assert os.listdir(tmp_path) == ["in"]


def test_room_runs_out(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", shards=2)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"out does not fit: no room is left"):
        convert(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_a_write_that_the_system_refuses(tmp_path):
    """A real one: a limit on the size of files, reached in the middle of a shard."""
    write_checkpoint(tmp_path / "in")
    code = f"""
import resource, signal
from pathlib import Path
from npqwen.errors import OutputError
from npqwen_quant import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    convert(Path({str(tmp_path / "in")!r}), Path({str(tmp_path / "out")!r}), 16)
except OutputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "out cannot be written: File too large" in done.stdout
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_place_that_is_not_writable(tmp_path):
    write_checkpoint(tmp_path / "in")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        convert(tmp_path / "in", tmp_path / "locked" / "out")


def test_parent_is_a_file(tmp_path):
    write_checkpoint(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(NpqwenError, match="cannot be written"):
        convert(tmp_path / "in", tmp_path / "file" / "out")


@pytest.mark.parametrize("bits", [4, 16])
def test_ctrl_c(tmp_path, bits):
    write_checkpoint(tmp_path / "in", make_config(vocab_size=20000, hidden_size=256))

    def interrupt(done: int, total: int) -> None:
        assert not (tmp_path / "out").exists()
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", bits, progress=interrupt)
    assert os.listdir(tmp_path) == ["in"]


def test_kill(tmp_path):
    """What a killed process leaves is no model, is left alone while it lives, and is removed by the next."""
    write_checkpoint(tmp_path / "in")
    code = f"""
import sys
from pathlib import Path
from npqwen_quant import convert
def wait(done, total):
    if done > total // 2:
        print("half", flush=True)
        sys.stdin.read()
convert(Path({str(tmp_path / "in")!r}), Path({str(tmp_path / "out")!r}), progress=wait)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline().strip() == b"half"
        (partial,) = (path for path in tmp_path.iterdir() if path.is_dir() and path.name != "in")
        assert partial.name.startswith(".out.partial-")
        convert(tmp_path / "in", tmp_path / "out")
        assert (partial / "model.safetensors").exists()
        process.kill()
        process.wait()
    assert not (partial / "config.json").exists()
    shutil.rmtree(tmp_path / "out")
    convert(tmp_path / "in", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.skipif(sys.platform == "win32", reason="no peak of memory to ask for")
def test_memory_stays_bounded(tmp_path):
    """A tensor of 200 MB is converted in a fraction of its size."""
    config = make_config(vocab_size=100_000, hidden_size=1024, intermediate_size=64, num_hidden_layers=1)
    tensors = random_tensors(config | {"vocab_size": 1})
    tensors["model.embed_tokens.weight"] = np.broadcast_to(np.uint16(0x3C12), (100_000, 1024))
    write_checkpoint(tmp_path / "in", config, tensors)
    write_checkpoint(tmp_path / "small")
    code = f"""
import resource
from pathlib import Path
from npqwen_quant import convert
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bits in (4, 16):
    convert(Path({str(tmp_path / "small")!r}), Path({str(tmp_path)!r}) / f"small-{{bits}}", bits, threads=2)
before = peak()
for bits in (4, 16):
    convert(Path({str(tmp_path / "in")!r}), Path({str(tmp_path)!r}) / f"out-{{bits}}", bits, threads=2)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 60e6
