"""GGUF files by path and by name on the hub: converted once, listed, removed, refused."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import Connection, FakeHub
from gguf_files import config, encode, metadata, quantized, write, write_shards

import npqwen
from npqwen import hub
from npqwen.errors import CheckpointError, ModelNotFoundError, NpqwenError, OptionError
from npqwen.format.quantization import Quantization
from npqwen.hub import record
from npqwen.hub.gguf_files import choose
from npqwen.hub.inventory import conversions as inventory

pytestmark = pytest.mark.usefixtures("cache")

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A quantized model of one layer."""
    layer = config(num_hidden_layers=1)
    path = tmp_path / "my-Q4_K_M.gguf"
    path.write_bytes(encode(metadata(layer), quantized("Q4_K", layer)[0]))
    return path


# --- on this machine ---


def test_a_file_is_converted_once_for_each_state(small: Path, cache: Path, conversions: list[Path]) -> None:
    notices: list[str] = []
    first = hub.resolve(small, notice=notices.append)
    assert first.parent == cache / "local" / "my-Q4_K_M"
    assert notices == [
        f"{small} is quantized already (Q4_K); quantizing it again adds error, which npqwen convert --evaluate "
        "measures",
        f"converting {small} to int4, once, into {first}",
    ]
    notices.clear()
    assert hub.resolve(small, notice=notices.append) == hub.resolve(small.parent) == first
    assert notices == [f"using {first}"]
    assert len(conversions) == 1
    assert record.read(first) == record.Record(str(small))
    time.sleep(0.01)
    os.utime(small)
    second = hub.resolve(small)
    assert second != first
    assert {one.path: one.stale is None for one in inventory(cache)} == {first: False, second: True}
    small.unlink()
    assert [one.stale for one in inventory(cache) if one.path == second] == ["its checkpoint is gone"]


def test_shards_are_one_model(tmp_path: Path, conversions: list[Path]) -> None:
    (tmp_path / "shards").mkdir()
    paths = write_shards(tmp_path / "shards")
    first = hub.resolve(paths[0])
    assert first.parent.name == "small"
    assert hub.resolve(paths[2]) == hub.resolve(tmp_path / "shards") == first
    assert len(conversions) == 1
    time.sleep(0.01)
    os.utime(paths[1])
    assert hub.resolve(paths[0]) != first


def test_it_runs_in_python_and_the_shell(small: Path, run: Run) -> None:
    with npqwen.load(small) as model:
        assert model.name == "my-Q4_K_M"
        assert model.generate("ab", max_tokens=3, temperature=0).ids
        assert model.render("ab") == "ab"
        assert model.chat("ab", max_tokens=3).messages
    out, _ = run("info", small)
    assert out.startswith("model           my-Q4_K_M\n")
    out, _ = run("list")
    assert f"\n{small} " in out
    _, err = run("rm", small, "-y")
    assert "removed 1 conversion" in err
    assert small.exists()


def test_floats_are_not_called_quantized_already(tmp_path: Path) -> None:
    notices: list[str] = []
    hub.resolve(write(tmp_path / "x.gguf"), notice=notices.append)
    assert [line.partition(" ")[0] for line in notices] == ["converting"]


def test_a_conversion_is_measured_against_the_file(small: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "text.txt").write_text("ab " * 400)
    _, err = run("convert", small, tmp_path / "out", "--evaluate", tmp_path / "text.txt", "--bits", "8")
    assert "KL divergence 0.0" in err
    assert "from the checkpoint" in err


def test_a_conversion_is_calibrated_with_a_file(small: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "text.txt").write_text("ab b a " * 1000)
    run("convert", small, tmp_path / "out", "--calibrate", tmp_path / "text.txt", "--no-evaluate")
    assert Quantization.from_directory(tmp_path / "out").calibration is not None


def test_a_model_that_cannot_chat(tmp_path: Path) -> None:
    """Before it is converted, and afterwards."""
    path = write(tmp_path / "x.gguf", tokenizer__chat_template=None)
    for _ in range(2):
        with pytest.raises(OptionError, match=r"x.gguf has no chat template, like all base models"):
            hub.resolve(path, purpose="chat")
        hub.resolve(path, purpose="text")


def test_a_revision_of_a_file(small: Path) -> None:
    with pytest.raises(OptionError, match="which has no revisions"):
        hub.resolve(small, revision="v1")


def test_a_pipe_in_place_of_a_file(tmp_path: Path, run: Run) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "x.gguf")
    _, err = run("generate", tmp_path / "x.gguf", "ab", status=2)
    assert "x.gguf cannot be read: it is not a regular file" in err


# --- on the hub ---


def publish(fake_hub: FakeHub, small: Path, **files: bytes) -> str:
    data = small.read_bytes()
    names = ("my-Q4_K_M.gguf", "my-Q8_0.gguf", "mmproj-F16.gguf", "README.md")
    extra = {name: data if name.startswith("my") else b"x" for name in names}
    return fake_hub.publish("org/my-GGUF", extra=extra | files, card={"base_model": ["org/my"]})


def test_only_the_named_quantization_is_downloaded(
    fake_hub: FakeHub, small: Path, cache: Path, conversions: list[Path], tmp_path: Path
) -> None:
    commit = publish(fake_hub, small)
    notices: list[str] = []
    first = hub.resolve("org/my-gguf:q8_0".replace("my-gguf", "my-GGUF"), notice=notices.append)
    assert first.parent == cache / "hub" / "org--my-GGUF"
    assert fake_hub.downloads == ["my-Q8_0.gguf"]
    assert notices[0].startswith("downloading org/my-GGUF:Q8_0: ")
    assert notices[1] == (
        "org/my-GGUF:Q8_0 is quantized already (Q4_K); quantizing it again adds error, which npqwen convert "
        "--evaluate measures; the original, org/my, loses less"
    )
    assert record.read(first) == record.Record("org/my-GGUF:Q8_0", {"main": commit})
    assert hub.resolve("https://huggingface.co/org/my-GGUF/blob/main/my-Q8_0.gguf") == first
    assert len(conversions) == 1
    shutil.rmtree(tmp_path / "hf")  # the download is not needed any more
    assert hub.resolve("org/my-GGUF:my-Q8_0.gguf") == first


def test_q4_k_m_is_the_usual_quantization(fake_hub: FakeHub, small: Path) -> None:
    publish(fake_hub, small)
    first = hub.resolve("org/my-GGUF")
    assert fake_hub.downloads == ["my-Q4_K_M.gguf"]
    assert hub.resolve("org/my-GGUF:Q4_K_M") == first


def test_a_repository_with_a_checkpoint_is_that_checkpoint(
    fake_hub: FakeHub, small: Path, checkpoint: Path
) -> None:
    fake_hub.publish("org/name", checkpoint, {"my-Q8_0.gguf": small.read_bytes()})
    hub.resolve("org/name")
    assert "my-Q8_0.gguf" not in fake_hub.downloads
    hub.resolve("org/name:Q8_0")
    assert fake_hub.downloads[-1] == "my-Q8_0.gguf"


def test_all_shards_are_downloaded(fake_hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    files = {f"Q8_0/{path.name}": path.read_bytes() for path in write_shards(tmp_path / "shards")}
    fake_hub.publish("org/big", extra=files | {"small-Q6_K.gguf": b"x"})
    hub.resolve("org/big:small-00001-of-00003.gguf")
    assert sorted(fake_hub.downloads) == sorted(files)
    fake_hub.publish("org/cut", extra=dict(list(files.items())[:2]))
    with pytest.raises(CheckpointError, match="has only 2 of the 3 shards of small"):
        hub.resolve("org/cut")


def test_what_the_hub_says_is_checked_before_a_download(fake_hub: FakeHub, small: Path) -> None:
    fake_hub.publish("org/llama", extra={"x-Q8_0.gguf": b"x"}, gguf={"architecture": "llama"})
    fake_hub.publish(
        "org/base", extra={"x-Q8_0.gguf": b"x"}, gguf={"architecture": "qwen3", "chat_template": ""}
    )
    with pytest.raises(CheckpointError, match="org/llama:Q8_0 has the architecture 'llama'"):
        hub.resolve("org/llama")
    with pytest.raises(OptionError, match="org/base:Q8_0 has no chat template"):
        hub.resolve("org/base", purpose="chat")
    with pytest.raises(OptionError, match=r"low_disk \(--low-disk\) does not work with GGUF files"):
        hub.resolve("org/base", low_disk=True)
    assert fake_hub.downloads == []


def test_without_the_hub(
    fake_hub: FakeHub, connection: Connection, small: Path, cache: Path, conversions: list[Path]
) -> None:
    publish(fake_hub, small)
    first = hub.resolve("org/my-GGUF:Q8_0")
    connection.error = OSError("no route to host")
    notices: list[str] = []
    assert hub.resolve("org/my-GGUF:q8_0", notice=notices.append) == first
    assert notices == [f"the hub cannot be reached (no route to host); using {first}"]
    assert hub.resolve("org/my-GGUF") == first  # the only one here
    with pytest.raises(ModelNotFoundError, match="no GGUF model matches 'Q4_K_M'; there are :Q8_0"):
        hub.resolve("org/my-GGUF:Q4_K_M")
    shutil.rmtree(cache / "hub")
    again = hub.resolve("org/my-GGUF:Q8_0")
    assert again == first
    assert len(conversions) == 2


def test_listed_and_removed_by_quantization(fake_hub: FakeHub, small: Path, run: Run) -> None:
    publish(fake_hub, small)
    run("pull", "org/my-GGUF:Q8_0")
    _, err = run("pull", "org/my-GGUF")
    assert "npqwen rm --download org/my-GGUF removes it" in err
    out, _ = run("list")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if row and row[0].startswith("org/")] == [
        "org/my-GGUF:Q4_K_M",
        "org/my-GGUF:Q8_0",
        "org/my-GGUF",
    ]
    assert next(row for row in rows if row[:1] == ["org/my-GGUF"])[-1] == "converted"
    _, err = run("rm", "my-gguf:q8_0".replace("my", "org/my"), "-y")
    assert "removed 1 conversion" in err
    assert "its download" in err
    out, _ = run("list")
    assert ":Q8_0" not in out
    _, err = run("rm", "org/my-GGUF", "--all", "-y")
    assert "removed 1 conversion and 1 download" in err


# --- quantizations ---

UNSLOTH = [
    "config.json",
    "Qwen3-8B-BF16.gguf",
    "Qwen3-8B-IQ4_XS.gguf",
    "Qwen3-8B-Q4_K_M.gguf",
    "Qwen3-8B-UD-Q4_K_XL.gguf",
    "Qwen3-8B-Q8_0.gguf",
    "imatrix_unsloth.gguf",
    "UD-Q8_K_XL/Qwen3-8B-UD-Q8_K_XL-00002-of-00002.gguf",
    "UD-Q8_K_XL/Qwen3-8B-UD-Q8_K_XL-00001-of-00002.gguf",
]
ODD = ["a.gguf", "b.Q8_0.gguf", "c_q6_k.GGUF", "d-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("names", "wanted", "tag", "files"),
    [
        (UNSLOTH, None, "Q4_K_M", ["Qwen3-8B-Q4_K_M.gguf"]),
        (UNSLOTH, "q8_0", "Q8_0", ["Qwen3-8B-Q8_0.gguf"]),
        (UNSLOTH, "bf16", "BF16", ["Qwen3-8B-BF16.gguf"]),
        (UNSLOTH, "IQ4_XS", "IQ4_XS", ["Qwen3-8B-IQ4_XS.gguf"]),
        (UNSLOTH, "Q4_K_XL", "UD-Q4_K_XL", ["Qwen3-8B-UD-Q4_K_XL.gguf"]),
        (UNSLOTH, "qwen3-8b-q8_0.gguf", "Q8_0", ["Qwen3-8B-Q8_0.gguf"]),
        (UNSLOTH, "UD-Q8_K_XL", "UD-Q8_K_XL", sorted(UNSLOTH[-2:])),
        (UNSLOTH, UNSLOTH[-1], "UD-Q8_K_XL", sorted(UNSLOTH[-2:])),
        (ODD, "a.gguf", "a.gguf", ["a.gguf"]),
        (ODD, "Q6_K", "q6_k", ["c_q6_k.GGUF"]),
        (ODD, "b.Q8_0", "b.Q8_0.gguf", ["b.Q8_0.gguf"]),
        (["x.gguf"], None, "x.gguf", ["x.gguf"]),
        (["x-Q6_K.gguf", "x-Q8_0.gguf", "mtp-x-Q4_K_M.gguf"], None, "Q8_0", ["x-Q8_0.gguf"]),
    ],
)
def test_quantizations(names: list[str], wanted: str | None, tag: str, files: list[str]) -> None:
    assert choose(names, wanted, "org/x") == (tag, files)


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (UNSLOTH, "Q5_K_M", "no GGUF model matches 'Q5_K_M'; there are :BF16, :IQ4_XS, :Q4_K_M, :Q8_0, "),
        (UNSLOTH, "K_M", "no GGUF model matches 'K_M'"),
        (ODD, None, "org/x has several GGUF models; append one of :a.gguf, :b.Q8_0.gguf, :q6_k, :d-Q8_0.gguf"),
        (ODD, "Q8_0", "several GGUF models match 'Q8_0'"),
        (["config.json"], "Q8_0", "org/x has no GGUF files"),
    ],
)
def test_quantizations_that_are_not_there(names: list[str], wanted: str | None, message: str) -> None:
    with pytest.raises(NpqwenError, match=message):
        choose(names, wanted, "org/x")
