"""Converted directories: one written by hand gives the right logits; damaged ones are refused, naming the problem."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config, write_checkpoint
from converted import MATRICES, encodings, tensors, write_model, write_safetensors
from quantized import QuantizedReference

from npqwen import CheckpointError, FormatError
from npqwen.chat.chat_template import ChatTemplate
from npqwen.commands import cli
from npqwen.engine.weights import Weights
from npqwen.format.config import Config
from npqwen.model import load
from npqwen.reports.info import inspect

IDS = np.random.default_rng(0).integers(0, 200, 40)
QK = "model.layers.1.self_attn.qk_proj.weight"
CODEBOOK = "model.layers.1.self_attn.qk_proj.codebook"
NORM = "model.layers.0.input_layernorm.weight"


def values(bits: int = 4) -> dict[str, np.ndarray]:
    return tensors(make_config(), dict.fromkeys(MATRICES, bits))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A good model: 2 layers, tied embedding, int4."""
    return write_model(tmp_path / "model", make_config(), values(), 4)


def check(directory: Path, tolerance: float = 0.05, lengths: Sequence[int] = (len(IDS),)) -> None:
    """The engine's logits of texts of these lengths are the oracle's."""
    oracle = QuantizedReference.from_directory(directory)
    expected = oracle.logits(IDS)
    with load(directory, threads=2) as loaded:
        for length in lengths:
            difference = loaded.logits(IDS[:length]) - expected[:length]
            assert np.abs(difference).max() < tolerance * np.abs(expected).max()


def test_big_endian_processors_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(FormatError, match="this processor is big-endian"):
        Weights(model, Config.from_directory(model))


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.05), (8, 0.05), (16, 2e-5)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_made_by_hand(tmp_path: Path, bits: int, tolerance: float, tied: bool) -> None:
    config = make_config(tie_word_embeddings=tied)
    path = write_model(tmp_path / "model", config, tensors(config, dict.fromkeys(MATRICES, bits)), bits)
    check(path, tolerance)


@pytest.mark.parametrize("bits", [(8, 4, 4, 16, 8, 4, 16), (4, 8, 8, 4, 4, 8, 8), (16, 16, 16, 8, 4, 16, 4)])
def test_matrices_of_different_encodings(tmp_path: Path, bits: tuple[int, ...]) -> None:
    """Whatever widths of tiles they are multiplied with."""
    config = make_config(tie_word_embeddings=False)
    made = tensors(config, dict(zip(MATRICES, bits, strict=True)))
    check(write_model(tmp_path / "model", config, made, 4), lengths=(1, 2, 5, 6, 7, 33, 39, 40))


def test_a_weight_is_where_the_format_says(tmp_path: Path) -> None:
    """A bf16 embedding byte by byte: the 16-bit element 16 * c + r is row r, column c."""
    config = make_config(num_hidden_layers=1, hidden_size=64, vocab_size=32)
    made = tensors(config, dict.fromkeys(MATRICES, 16))
    for name, value in made.items():
        if "proj" in name:
            value[:] = 0  # Only the embedding and the last norm are left.
    embedding = np.random.default_rng(1).standard_normal((32, 64)).astype(np.float32)
    units = bytearray(2 * 4096)
    for row in range(32):
        for column in range(64):
            top_half = struct.pack("<f", embedding[row, column])[2:]
            at = 4096 * (row // 16) + 2 * (16 * column + row % 16)
            units[at : at + 2] = top_half
            embedding[row, column] = struct.unpack("<f", b"\0\0" + top_half)[0]
    made["model.embed_tokens.weight"] = np.frombuffer(units, np.uint8).reshape(2, 4096)
    norm = made["model.norm.weight"] = np.linspace(0.5, 2, 64, dtype=np.float32)
    expected = embedding / np.sqrt((embedding**2).mean(1, keepdims=True) + 1e-6) * norm @ embedding.T
    with load(write_model(tmp_path / "model", config, made, 16), threads=1) as loaded:
        assert np.allclose(loaded.logits(range(32)), expected, atol=1e-4)


def test_shards(model: Path) -> None:
    whole = values()
    names = list(whole)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:5], names[5:6], names[6:]), 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        write_safetensors(model / file, {name: whole[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (model / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    check(model)
    (model / "model-00002-of-00003.safetensors").unlink()
    refused(model, r"model-00002-of-00003\.safetensors is missing, which model.safetensors.index.json names")


def test_extra_tensors_and_metadata_do_no_harm(model: Path) -> None:
    made = {**values(), "model.layers.0.extra": np.zeros(16, np.float32)}
    metadata = {"format": "npqwen", "format_version": "2", "note": "by hand"}
    write_safetensors(model / "model.safetensors", made, __metadata__=metadata)
    check(model)


def refused(directory: Path, message: str) -> None:
    """Assert that Weights and load() both refuse a directory, in one line that matches."""
    with pytest.raises((FormatError, CheckpointError), match=message) as error:
        Weights(directory, Config.from_directory(directory)).check_values()
    assert "\n" not in str(error.value)
    with pytest.raises(type(error.value), match=message):
        load(directory)


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of model.safetensors and leave the data."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def entry(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[name] |= changes

    return change


def metadata(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"] |= changes

    return change


def drop(name: str, key: str | None = None) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        del (header if key is None else header[name])[name if key is None else key]

    return change


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dtype": (drop(NORM, "dtype"), f"tensor {NORM} has an impossible entry"),
    "no offsets": (drop(NORM, "data_offsets"), f"tensor {NORM} has an impossible entry"),
    "offsets that are words": (entry(NORM, data_offsets=["a", "b"]), f"tensor {NORM}"),
    "three offsets": (entry(NORM, data_offsets=[0, 1, 2]), f"tensor {NORM}"),
    "infinite offset": (entry(NORM, data_offsets=[0, float("inf")]), f"tensor {NORM}"),
    "infinite shape": (entry(NORM, shape=[float("inf")]), f"tensor {NORM}"),
    "half an offset": (entry(NORM, data_offsets=[0.5, 320.5]), f"tensor {NORM}"),
    "no shape": (entry(NORM, shape=None), f"tensor {NORM}"),
    "negative shape": (entry(NORM, shape=[-80]), f"tensor {NORM}"),
    "two negative sizes": (entry(NORM, shape=[-8, -10]), f"tensor {NORM}"),
    "empty tensor": (entry(NORM, shape=[0]), f"tensor {NORM}"),
    "huge shape": (entry(NORM, shape=[2**62, 2**62]), f"tensor {NORM}"),
    "a hundred thousand dimensions": (entry(NORM, shape=[2**62] * 100_000), f"tensor {NORM} has an impossible entry"),
    "size and shape disagree": (entry(NORM, shape=[64]), f"tensor {NORM} has 320 bytes"),
    "negative offsets": (entry(NORM, data_offsets=[-320, 0]), f"tensor {NORM}"),
    "backward offsets": (entry(NORM, data_offsets=[320, 0]), f"tensor {NORM}"),
    "past the end": (entry(NORM, data_offsets=[2**40, 2**40 + 320]), f"tensor {NORM} would lie outside the file"),
    "overlap": (entry(NORM, data_offsets=[64, 384]), "overlaps another one"),
    "hole": (drop(NORM), "leaves a hole"),
    "an entry that is a list": (lambda h: h | {NORM: [1]}, f"tensor {NORM} has no entry"),
    "an entry that is null": (lambda h: h | {NORM: None}, f"tensor {NORM} has no entry"),
    "a long name": (lambda h: h | {"x" * 1_000_000: None}, r"tensor x{80}\.\.\. has no entry"),
    "a list": (lambda h: b"[1, 2]", "its header is not a JSON object"),
    "no JSON": (lambda h: b"{'a': 1}", "its header is not JSON"),
    "no UTF-8": (lambda h: b"\xff\xfe{}", "its header is not JSON"),
    "UTF-16": (lambda h: json.dumps(h).encode("utf-16"), "its header is not JSON"),
    "deep nesting": (lambda h: b"[" * 200_000, "its header is not JSON"),
    "a long number": (lambda h: b'{"a": ' + b"9" * 5000 + b"}", "model.safetensors"),
    "foreign file": (lambda h: h | {"__metadata__": {"format": "pt"}}, "was not made by npqwen"),
    "no metadata": (drop("__metadata__"), "was not made by npqwen"),
    "metadata of another kind": (lambda h: h | {"__metadata__": "npqwen"}, "__metadata__ is not an object of strings"),
    "metadata of another version": (metadata(format_version="1"), "has format version '1', but config.json says 2"),
    "metadata of no version": (metadata(format_version=None), "__metadata__ is not an object of strings"),
    "empty header": (lambda h: b"{}", "its tensors end at byte"),
}

WRONG: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    "missing tensor": ({QK: None}, rf"{QK} is missing"),
    "missing vector": ({NORM: None}, rf"{NORM} is missing"),
    "wrong number of rows": ({QK: np.zeros((11, 1152), np.uint8)}, rf"tensor {QK} is U8 \[11, 1152\], config"),
    "wrong number of columns": ({QK: np.zeros((12, 64 + 2 * 1088), np.uint8)}, f"tensor {QK} is U8"),
    "unknown unit": ({QK: np.zeros((12, 1088), np.uint8)}, f"tensor {QK} is U8"),
    "another encoding's unit": (
        {QK: np.zeros((12, 64 + 2112), np.uint8)},
        rf"tensor {QK} is U8 \[12, 2176\], config.json requires U8 \[12, 1152\] for int4",
    ),
    "one dimension": ({QK: np.zeros(12 * 1152, np.uint8)}, f"tensor {QK} is U8"),
    "a matrix as floats": ({QK: np.zeros((12, 288), np.float32)}, f"tensor {QK} is F32"),
    "no codebook": ({CODEBOOK: None}, rf"{CODEBOOK} is missing"),
    "a longer codebook": ({CODEBOOK: np.zeros(128, np.uint8)}, rf"tensor {CODEBOOK} is U8 \[128\], .* for int4"),
    "a codebook of 64 values": ({CODEBOOK: np.arange(64, dtype=np.uint8)}, f"{CODEBOOK} is not 16 values below 64"),
    "a codebook of large values": ({CODEBOOK: np.full(64, 64, np.uint8)}, rf"{CODEBOOK} is not 16 values below 64"),
    "a vector as bytes": ({NORM: np.zeros(320, np.uint8)}, f"tensor {NORM} is U8"),
    "a longer vector": ({NORM: np.zeros(96, np.float32)}, f"tensor {NORM} is F32"),
    "a vector with NaN": (
        {NORM: np.array([np.nan, *[1] * 79], np.float32)},
        f"tensor {NORM} has NaN or infinity; copy or convert it again",
    ),
    "foreign dtype": (
        {NORM: np.zeros(80, np.float16)},
        f"tensor {NORM} has dtype F16, but the format has only F32 and U8",
    ),
    "misaligned": ({"a": np.zeros(1, np.float32)}, "is not aligned to 64 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_with_the_wrong_tensors(model: Path, case: str) -> None:
    changes, message = WRONG[case]
    whole = {**changes, **values(), **changes}
    write_safetensors(model / "model.safetensors", {name: v for name, v in whole.items() if v is not None})
    refused(model, message)


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers(model: Path, lie: str) -> None:
    change, message = LIES[lie]
    edit(model, change)
    refused(model, message)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 4000, -1, -64, -5000])
def test_truncated_files(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:keep])
    refused(model, r"model\.safetensors.*(truncated|damaged|no safetensors)")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 10**8 + 1])
def test_impossible_header_lengths(model: Path, length: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(model, "damaged or truncated: its header would be")


def test_files_of_other_kinds(model: Path) -> None:
    path = model / "model.safetensors"
    for content in (b"", b"GGUF" + bytes(1000), b"\x80\x02" * 500, bytes(64)):
        path.write_bytes(content)
        refused(model, r"model\.safetensors")
    path.unlink()
    refused(model, r"model\.safetensors is missing")
    path.mkdir()
    refused(model, r"model\.safetensors")


def configured(directory: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


ENCODINGS = encodings(make_config(), values())


def quantization(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"quant_method": "npqwen", "format_version": 2, "bits": 4, "created_by": "a test"}
    made |= {"encodings": ENCODINGS} | changes
    return {"quantization_config": {key: value for key, value in made.items() if value is not None}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (quantization(format_version=3), "format version 3; this npqwen reads 2; upgrade npqwen"),
        (
            quantization(format_version=1, encodings=None),
            "format version 1; this npqwen reads 2; convert its checkpoint again: npqwen convert CHECKPOINT .* "
            "--bits 4 --force",
        ),
        (quantization(format_version=None), "format version None"),
        (quantization(format_version="2"), "format version '2'"),
        (quantization(format_version=2.0), r"format version 2\.0"),
        (quantization(encodings=None), "quantization_config has no encodings"),
        (quantization(encodings=["int4"]), "quantization_config has no encodings"),
        (quantization(encodings={QK: "int7"}), f"tensor {QK} has the encoding 'int7', which this npqwen does not"),
        (quantization(encodings={QK: 4}), f"tensor {QK} has the encoding 4, which this npqwen does not"),
        (quantization(encodings={QK: "int4"}), "not name the encoding of tensor model.embed_tokens.weight"),
        (quantization(encodings={**ENCODINGS, QK: "int8"}), f"tensor {QK} is U8 .* for int8"),
        (quantization(encodings={**ENCODINGS, "model.x": "int4"}), r"gives tensor model\.x an encoding"),
        (quantization(bits=16), "has the encoding int4, which models of 16 bits do not have"),
        (quantization(bits=4.0), r"bits is 4\.0; it can be 3, 4, 8 or 16"),
        (quantization(bits=None), "bits"),
        (quantization(bits=5), "bits"),
        (quantization(bits="4"), "bits"),
        (quantization(quant_method="gptq"), "not a converted model"),
        ({"quantization_config": None}, "not a converted model"),
        ({"quantization_config": [1]}, "not a converted model"),
        ({"hidden_size": 200}, r"tensor model\.embed_tokens\.weight is U8"),
        ({"vocab_size": 300}, r"tensor model\.embed_tokens\.weight is U8"),
        ({"intermediate_size": 300}, "tensor model.layers.0.mlp.gate_up_proj.weight is U8"),
        ({"num_attention_heads": 8}, f"tensor {QK.replace('1', '0')} is U8"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, r"gives tensor model\.layers\.1\.self_attn.* an encoding, but its other keys"),
        ({"num_hidden_layers": 2**31}, r"model\.layers\.2|num_hidden_layers"),
        ({"tie_word_embeddings": False}, r"lm_head.weight is missing; .* again \(with --force\)"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": "x"}}, "attention_factor is 'x'"),
        ({"rope_theta": 10**400}, "rope_theta is"),
        ({"head_dim": 24}, "head_dim 24"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"model_type": "llama"}, "model_type 'llama'"),
    ],
)
def test_configs_that_do_not_match_the_tensors(model: Path, changes: dict[str, Any], message: str) -> None:
    configured(model, **changes)
    refused(model, message)


def test_a_checkpoint_is_not_a_converted_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    refused(tmp_path / "checkpoint", "is not a converted model; make one with: npqwen convert")


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        "[]",
        "no JSON",
        '{"weight_map": {"a": "../../b.safetensors"}}',
        json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}),
    ],
)
def test_damaged_indexes(model: Path, index: str) -> None:
    (model / "model.safetensors.index.json").write_text(index)
    refused(model, r"model\.safetensors\.index\.json")


def test_a_tensor_in_two_shards(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "b.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, "is in another file too")


@pytest.mark.parametrize("command", [["generate", "{}", "hello"], ["info", "{}"], ["bench", "{}"]])
def test_commands_report_one_line(
    model: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_safetensors(model / "model.safetensors", {name: v for name, v in values().items() if name != QK})
    with pytest.raises(SystemExit) as exit:
        cli.main([word.format(model) for word in command])
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.startswith("npqwen: error: ")
    assert QK in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "[]", '{"model_type": "qwen3", "hidden_size": ' + "9" * 5000 + "}", "\udcff"]
)
def test_damaged_configs(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(model, r"config\.json")


def endless(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 10**11)
    else:
        path.symlink_to(kind)


KINDS = ["/dev/zero", "/dev/full", "pipe", "sparse"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="devices and pipes of POSIX")


@posix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "generation_config.json"],
)
def test_files_that_have_no_end(model: Path, name: str, kind: str) -> None:
    endless(model / name, kind)
    problem = f"{name} cannot be read: it is not a regular file"
    if kind == "sparse":
        header = "model.safetensors is damaged or truncated: its header would be 0 bytes"
        too_large = f"{name} cannot be read: it is larger than (16|50|64|100) MB"
        problem = header if name == "model.safetensors" else too_large
    with pytest.raises((CheckpointError, FormatError), match=problem):
        load(model, threads=1)


@posix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_optional_files_that_have_no_end(model: Path, name: str, kind: str) -> None:
    """Anything but a regular file counts as missing."""
    endless(model / name, kind)
    if kind == "sparse":
        with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is larger than (16|50|64|100) MB"):
            ChatTemplate.from_directory(model)
    else:
        assert "default" in ChatTemplate.from_directory(model).names or name == "tokenizer_config.json"


@posix
def test_a_file_that_is_cut_while_it_is_mapped_is_an_error(model: Path) -> None:
    with load(model, threads=2) as loaded:
        loaded.logits(IDS)
        os.truncate(model / "model.safetensors", 5000)
        with pytest.raises(FormatError, match="became shorter after the model was loaded; load it again"):
            loaded.logits(IDS)


@posix
def test_a_file_that_is_replaced_while_it_is_mapped_changes_nothing(model: Path) -> None:
    with load(model, threads=1) as loaded:
        expected = loaded.logits(IDS)
        (model / "new").write_bytes(b"something else")
        os.replace(model / "new", model / "model.safetensors")
        np.testing.assert_array_equal(loaded.logits(IDS), expected)


def test_to_describe_a_model_reads_none_of_its_weights(model: Path) -> None:
    """Codebooks lie among the weights: to read them all takes half of a file from the disk."""
    write_safetensors(model / "model.safetensors", {**values(), CODEBOOK: np.full(64, 64, np.uint8)})
    assert inspect(model).bits == 4
    refused(model, f"{CODEBOOK} is not 16 values below 64")
