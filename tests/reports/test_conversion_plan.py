"""`npqwen convert --dry-run`: held to conversions that are made; nothing is downloaded or written."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import MIXTURE, make_config, shapes, write_checkpoint
from fake_hub import FakeHub
from gguf_files import write

from npqwen import hub
from npqwen.commands import cli
from npqwen.errors import CheckpointError, ModelNotFoundError, OptionError
from npqwen.reports.conversion_plan import ConversionPlan, Part, plan_conversion
from npqwen.reports.info import inspect

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npqwen_quant.speed.weights_per_second.__defaults__", (0.01,))


def state(*places: Path) -> dict[str, str]:
    """Every file below some places, with a digest."""
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha1(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, MIXTURE])
def test_sizes_are_those_of_the_conversion(tmp_path: Path, bits: int, changes: dict[str, Any]) -> None:
    config = make_config(vocab_size=4128, **changes)
    write_checkpoint(tmp_path / "in", config, tokenizer=True)
    (tmp_path / "in" / "README.md").write_text("a model")
    plan = plan_conversion(tmp_path / "in", tmp_path / "out", bits)
    assert not (tmp_path / "out").exists()
    hub.convert(tmp_path / "in", tmp_path / "out", bits)
    info = inspect(tmp_path / "out")
    assert {name: part.bytes for name, part in plan.parts.items()} == info.parts
    assert plan.weights == info.weights
    assert (plan.cache, plan.context, plan.kv) == (info.cache, info.context, info.kv)
    assert sorted(plan.encodings) == sorted(info.encodings)
    want = {"embedding": math.prod(shapes(config)["model.embed_tokens.weight"])}
    want["norms"] = sum(shape[0] for shape in shapes(config).values() if len(shape) == 1)
    assert {name: plan.parts[name].weights for name in want} == want
    assert sum(part.weights for part in plan.parts.values()) == sum(map(math.prod, shapes(config).values()))
    files = [path for path in (tmp_path / "out").iterdir() if path.name not in ("config.json", "npqwen-checksums.json")]
    assert plan.weights + plan.small_files == pytest.approx(sum(path.stat().st_size for path in files), abs=10_000)
    assert plan.seconds > 0
    assert plan.download == 0


def test_a_gguf_file(fake_hub: FakeHub, tmp_path: Path) -> None:
    """Here, as other sources; on the hub nothing is known of it."""
    path = write(tmp_path / "x-Q8_0.gguf")
    plan = plan_conversion(path, tmp_path / "out", 8)
    hub.convert(path, tmp_path / "out", 8)
    info = inspect(tmp_path / "out")
    assert {name: part.bytes for name, part in plan.parts.items()} == info.parts
    assert plan.largest_file == path.stat().st_size
    fake_hub.publish("org/x", extra={path.name: path.read_bytes()})
    with pytest.raises(OptionError, match=r"org/x:Q8_0 is a GGUF file, .*npqwen pull org/x:Q8_0\)"):
        plan_conversion("org/x")
    assert fake_hub.downloads == []


def test_a_model_on_the_hub(fake_hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", make_config(vocab_size=4128), tokenizer=True, shards=3)
    total = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    largest = max(path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors"))
    local = plan_conversion(tmp_path / "in", bits=8)
    fake_hub.publish("org/name", tmp_path / "in")
    before = state(tmp_path)
    plan = plan_conversion("org/name", bits=8)
    assert state(tmp_path) == before
    assert fake_hub.downloads == ["config.json", "model.safetensors.index.json"]
    assert plan.parts == local.parts
    assert (plan.download, plan.largest_file) == (total, largest)
    assert plan.disk == total + plan.weights + plan.small_files
    assert plan_conversion("org/name", bits=8, low_disk=True).disk == largest + plan.weights + plan.small_files
    assert plan.place == hub.convert("org/name", bits=8)
    again = plan_conversion("org/name", bits=8)
    assert again.exists
    assert again.download == 0


def test_what_could_not_be_converted_is_refused(fake_hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        plan_conversion("org/nothing")
    shutil.copytree(checkpoint, tmp_path / "cut")
    data = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        plan_conversion(tmp_path / "cut")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**6}))
    (tmp_path / "cut" / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="too few"):
        plan_conversion(tmp_path / "cut")
    fake_hub.publish("org/cut", tmp_path / "cut")
    with pytest.raises(CheckpointError, match="too few"):
        plan_conversion("org/cut")


def test_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ConversionPlan(
        source="Qwen/Qwen3-0.6B",
        place=Path("out"),
        exists=True,
        bits=4,
        encodings=("int5", "int4"),
        parts={"embedding": Part(1_000_000, 656_250), "norms": Part(1000, 4000)},
        small_files=12_000_000,
        download=1_500_000_000,
        largest_file=1_500_000_000,
        disk=1_900_000_000,
        free=40_000_000_000,
        context=40_960,
        kv="int8",
        cache=2_400_000_000,
        cache_token=59_000,
        available_memory=8_000_000_000,
        threads=4,
        seconds=17.4,
    )
    assert plan.describe().splitlines() == [
        "model           Qwen/Qwen3-0.6B",
        f"result          {Path('out')}, which exists already",
        "size            12.7 MB, 5.28 bits per weight",
        "  embedding     656 kB  5.25 bits per weight",
        "  norms         4 kB    32.00 bits per weight",
        "encodings       int5, int4",
        "memory          2.4 GB for weights and 40,960 tokens of context; 8.0 GB available",
        "  weights       660 kB, mapped from the files",
        "  cache         59 kB a token, in int8",
        "download        1.5 GB, about 2 minutes at 100 Mbit/s",
        "disk            1.9 GB needed, 40.0 GB free",
        "time            about 17 seconds on 4 threads, if the disk keeps up",
    ]


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(tmp_path)
    with pytest.raises(SystemExit) as exit:
        cli.main(["convert", str(checkpoint), str(tmp_path / "out"), "--dry-run", "--bits", "8"])
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    assert out.startswith(f"model           {checkpoint}\nresult          {tmp_path / 'out'}\n")
    assert state(tmp_path) == before
