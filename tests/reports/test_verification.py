"""Verifying a converted model: what is damaged, by file and name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import make_config, read_safetensors, write_checkpoint
from npqwen_quant import convert, update

import npqwen
from npqwen.errors import CheckpointError, FormatError
from npqwen.format.checksums import NAME
from npqwen.format.quantization import EvaluationRecord, store_evaluation
from npqwen.reports.verification import Damage, verify

TENSOR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    write_checkpoint(place / "in", make_config(vocab_size=4128), tokenizer=True)
    (place / "in" / "README.md").write_text("a model")
    convert(place / "in", place / "out", 4, shard_bytes=200_000)
    return place / "out"


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def place_of(model: Path, name: str) -> tuple[Path, int, int]:
    """The file of a tensor, and where it begins and ends."""
    path = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    first, last = json.loads(raw[8:start])[name]["data_offsets"]
    return path, start + first, start + last


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_checksums_are_digests_of_what_is_stored(model: Path) -> None:
    stored = json.loads((model / NAME).read_text())
    tensors = {
        name: hashlib.sha256(values.tobytes()).hexdigest()
        for path in sorted(model.glob("*.safetensors"))
        for name, values in read_safetensors(path).items()
    }
    assert stored["algorithm"] == "sha256"
    assert stored["tensors"] == tensors
    small = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    digests = {name: hashlib.sha256((model / name).read_bytes()).hexdigest() for name in small}
    config = json.loads((model / "config.json").read_text())
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    assert stored["files"] == digests | {"config.json": hashlib.sha256(text.encode()).hexdigest()}


def test_a_whole_model(model: Path) -> None:
    shown: list[tuple[int, int]] = []
    found = npqwen.verify(model, lambda *state: shown.append(state))
    assert found.is_right
    assert found.has_checksums
    assert found.tensors == len(json.loads((model / NAME).read_text())["tensors"])
    assert shown[0] == (0, found.bytes)
    assert shown[-1] == (found.bytes, found.bytes)
    assert found.describe().startswith(f"{model}: all right, {found.tensors} tensors, ")


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_bit_of_a_tensor(model: Path, where: str) -> None:
    path, start, end = place_of(model, TENSOR)
    flip(path, {"first": start, "middle": (start + end) // 2, "last": end - 1}[where], 7)
    found = verify(model)
    assert found.damage == (Damage(path.name, TENSOR, "is damaged"),)
    assert found.describe() == f"{model}: damaged in 1 place\n  {path.name}: {TENSOR} is damaged"


def cut(model: Path) -> None:
    path, _, _ = place_of(model, TENSOR)
    path.write_bytes(path.read_bytes()[:-1])


def lost(model: Path) -> None:
    place_of(model, TENSOR)[0].unlink()



def header(model: Path) -> None:
    flip(place_of(model, TENSOR)[0], 8)


def renamed(model: Path) -> None:
    path, _, _ = place_of(model, TENSOR)
    path.write_bytes(path.read_bytes().replace(TENSOR.encode(), TENSOR.replace("down", "dawn").encode()))


def tokenizer(model: Path) -> None:
    flip(model / "tokenizer.json", 5000)


def config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000', '"rope_theta": 10001'))


def checksums(model: Path) -> None:
    (model / NAME).write_text((model / NAME).read_text()[:-20])


@pytest.mark.parametrize(
    ("hurt", "files", "problem"),
    [
        (cut, ["model-*"], "is damaged: "),
        (lost, ["model-*"], "is missing"),
        (header, ["model-*"], "is damaged: "),
        (renamed, ["model-*", "weights"], "does not belong to the model"),
        (tokenizer, ["tokenizer.json"], "is damaged, or was edited"),
        (config, ["config.json"], "is damaged, or was edited"),
        (checksums, [NAME], "is damaged"),
    ],
)
def test_damaged_files(model: Path, hurt: Callable[[Path], None], files: list[str], problem: str) -> None:
    shard = place_of(model, TENSOR)[0].name
    hurt(model)
    found = verify(model)
    assert [one.file for one in found.damage] == [shard if name == "model-*" else name for name in files]
    assert found.damage[0].problem.startswith(problem)
    assert found.has_checksums == (hurt is not checksums)


def test_names_of_files_cannot_look_like_lines_of_the_report(model: Path) -> None:
    content = json.loads((model / NAME).read_text())
    content["files"]["\x1b[2K\nx: all right" + "x" * 1000] = "0"
    (model / NAME).write_text(json.dumps(content))
    lines = verify(model).describe().splitlines()
    assert lines[0] == f"{model}: damaged in 1 place"
    assert lines[1].startswith("  [2K x: all rightxxx")
    assert len(lines) == 2
    assert max(map(len, lines[1:])) < 200


def test_what_may_change(model: Path) -> None:
    """A stored evaluation, and files for people."""
    record = EvaluationRecord("text", 5, 5, 5, "bf16", 2.0, 0.1, 0.01, 0.9)
    store_evaluation(model, record)
    (model / "README.md").write_text("better words")
    (model / "notes.txt").write_text("of mine")
    assert verify(model).is_right


def test_an_earlier_model_has_no_checksums(model: Path) -> None:
    (model / NAME).unlink()
    found = verify(model)
    assert found.is_right
    assert not found.has_checksums
    assert "it has no checksums" in found.describe()
    cut(model)
    assert not verify(model).is_right


def test_weights_that_config_json_does_not_describe(model: Path) -> None:
    """Structure is checked, also of a model without checksums."""
    (model / NAME).unlink()
    path = model / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 72', '"hidden_size": 640'))
    (damage,) = verify(model).damage
    assert damage.problem.startswith("and the weights do not fit together: ")


def test_new_small_files_keep_the_checksums_of_tensors(whole: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parent / "in", tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text('{"temperature": 0.5}')
    path, start, _ = place_of(model, TENSOR)
    update(model, tmp_path / "in", tmp_path / "updated")
    assert verify(tmp_path / "updated").is_right
    flip(path, start)
    shutil.rmtree(tmp_path / "updated")
    update(model, tmp_path / "in", tmp_path / "updated")
    assert verify(tmp_path / "updated").damage == (Damage(path.name, TENSOR, "is damaged"),)
    (model / NAME).unlink()
    shutil.rmtree(tmp_path / "updated")
    update(model, tmp_path / "in", tmp_path / "updated")
    assert not verify(tmp_path / "updated").has_checksums


def test_what_is_not_a_converted_model(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a converted model"):
        verify(whole.parent / "in")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        verify(tmp_path / "nowhere")
