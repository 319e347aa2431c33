"""From a checkpoint directory to a converted directory: once for each state of its files."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import npqwen_quant
import npqwen_quant.output
import pytest
from checkpoints import write_checkpoint

from npqwen import hub
from npqwen.errors import CheckpointError, ModelNotFoundError, OptionError, OutputError
from npqwen.format.quantization import EvaluationRecord, Quantization, store_evaluation
from npqwen.hub.conversions import find_source
from npqwen.hub.names import HubName, model_name

pytestmark = pytest.mark.usefixtures("cache")


def bits_of(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text())["quantization_config"]["bits"])


def test_a_checkpoint_is_converted_once_into_the_cache(checkpoint: Path, cache: Path, conversions: list[Path]) -> None:
    notices: list[str] = []
    progress: list[tuple[int, int]] = []
    first = hub.resolve(checkpoint, notice=notices.append, progress=lambda *state: progress.append(state))
    assert cache in first.parents
    assert bits_of(first) == 4
    assert notices == [f"converting {checkpoint} to int4, once, into {first}"]
    assert progress[-1][0] == progress[-1][1] > 0
    notices.clear()
    assert hub.resolve(str(checkpoint), 4, notice=notices.append) == first
    assert notices == [f"using {first}"]
    assert len(conversions) == 1


def test_a_converted_checkpoint_is_found_by_its_name_alone(
    checkpoint: Path, tmp_path: Path, cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    monkeypatch.chdir(cache)
    with pytest.raises(ModelNotFoundError, match="neither a directory nor a hub id"):
        hub.resolve(checkpoint.name)
    place = hub.resolve(checkpoint)
    assert hub.resolve(checkpoint.name) == hub.find_converted(checkpoint.name, 4) == place
    assert model_name(checkpoint.name) == checkpoint.name
    other = tmp_path / "elsewhere" / checkpoint.name
    shutil.copytree(checkpoint, other)
    hub.resolve(other)
    places = ", ".join(sorted([str(checkpoint), str(other)]))
    with pytest.raises(ModelNotFoundError, match=f"is the name of several models; give one of {re.escape(places)}$"):
        hub.resolve(checkpoint.name)
    shutil.rmtree(checkpoint)
    assert hub.resolve(checkpoint.name).parent == place.parent
    assert len(conversions) == 2


def test_other_bits_and_other_files_are_other_conversions(
    checkpoint: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    places = [hub.resolve(checkpoint, bits) for bits in (4, 8, 16)]
    assert [bits_of(place) for place in places] == [4, 8, 16]

    stat = (checkpoint / "model.safetensors").stat()
    write_checkpoint(checkpoint, tokenizer=True)
    os.utime(checkpoint / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    places.append(hub.resolve(checkpoint))

    shutil.copytree(checkpoint, tmp_path / "copy")
    places.append(hub.resolve(tmp_path / "copy"))
    assert len(set(places)) == len(conversions) == 5

    (checkpoint / "README.md").write_text("no part of the model")
    assert hub.resolve(checkpoint) == places[-2]


def test_new_small_files_come_beside_the_same_weights(checkpoint: Path, conversions: list[Path]) -> None:
    first = hub.resolve(checkpoint)
    before = (first / "generation_config.json").read_bytes()
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.5}')
    notices: list[str] = []
    second = hub.resolve(checkpoint, notice=notices.append)
    assert second != first
    assert len(conversions) == 1
    assert notices == [f"the weights of {checkpoint} were converted before: only small files are new, in {second}"]
    assert (second / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert (first / "generation_config.json").read_bytes() == before  # it may be in use
    assert (second / "model.safetensors").samefile(first / "model.safetensors")
    assert Quantization.from_directory(second) == Quantization.from_directory(first)


@pytest.mark.parametrize("links", [True, False])
def test_an_evaluation_is_kept_unless_the_tokenizer_changed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    first = hub.resolve(checkpoint)
    found = EvaluationRecord("text", 100, 50, 50, "bf16", 2.0, 0.1, 0.01, 0.9)
    store_evaluation(first, found)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    second = hub.resolve(checkpoint)
    assert Quantization.from_directory(second).evaluation == found
    assert (second / "model.safetensors").samefile(first / "model.safetensors") == links
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    (checkpoint / "tokenizer.json").write_text("{}")
    assert Quantization.from_directory(hub.resolve(checkpoint)).evaluation is None


def test_a_link_is_the_directory_it_names(checkpoint: Path, tmp_path: Path, conversions: list[Path]) -> None:
    try:
        (tmp_path / "link").symlink_to(checkpoint, target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    assert hub.resolve(tmp_path / "link") == hub.resolve(checkpoint)
    assert len(conversions) == 1


def test_a_url_is_a_repository_where_no_file_can_be_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class InvalidName(OSError):
        winerror = 123

    def refused(path: Path) -> os.stat_result:
        raise InvalidName(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect")

    def look_up(name: HubName) -> None:
        raise ModelNotFoundError(f"looked up: {name}")

    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr("npqwen.hub.conversions.look_up", look_up)
    with pytest.raises(ModelNotFoundError, match=r"^looked up: Qwen/Qwen3-0\.6B$"):
        find_source("https://huggingface.co/Qwen/Qwen3-0.6B")


def test_a_converted_directory_is_used_in_place(checkpoint: Path, tmp_path: Path, conversions: list[Path]) -> None:
    out = tmp_path / "out"
    assert hub.convert(checkpoint, out, 8) == out
    assert hub.resolve(out) == hub.resolve(out, 8) == out
    with pytest.raises(OptionError, match="converted to 8 bits, but 4 were requested"):
        hub.resolve(out, 4)
    with pytest.raises(CheckpointError, match="converted already"):
        hub.convert(out)
    assert len(conversions) == 1


@pytest.mark.parametrize("bits", [0, 5, "4", True, 4.5])
def test_impossible_bits(checkpoint: Path, bits: Any) -> None:
    for function in (hub.resolve, hub.convert):
        with pytest.raises(OptionError, match="it can be 3, 4, 8 or 16"):
            function(checkpoint, bits=bits)


def test_convert_into_the_cache_and_again_by_force(checkpoint: Path, conversions: list[Path]) -> None:
    place = hub.convert(checkpoint)
    assert place == hub.resolve(checkpoint) == hub.convert(checkpoint)
    assert len(conversions) == 1
    assert hub.convert(checkpoint, force=True) == place
    assert len(conversions) == 2


def test_convert_does_not_replace_what_is_there(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.convert(checkpoint, out)
    with pytest.raises(OutputError, match="exists already"):
        hub.convert(checkpoint, out, 8)
    hub.convert(checkpoint, out, 8, force=True)
    assert bits_of(out) == 8


def test_the_result_of_a_faster_process_is_used(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = npqwen_quant.convert

    def overtaken(source: Path, out: Path, bits: int, **options: Any) -> None:
        convert(source, out, bits)  # the other process
        convert(source, out, bits, **options)

    monkeypatch.setattr(npqwen_quant, "convert", overtaken)
    assert bits_of(hub.resolve(checkpoint)) == 4


def test_two_processes_at_once(checkpoint: Path, cache: Path) -> None:
    script = f"from npqwen import hub; print(hub.resolve({str(checkpoint)!r}))"
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in "ab"]
    outputs = {process.communicate(timeout=300)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (place,) = outputs
    assert sorted(path.name for path in Path(place).parent.iterdir()) == [Path(place).name]
    assert Quantization.from_directory(Path(place)).recipe.bits == 4


HOLDING = """
import sys
from npqwen_quant import convert
def wait(done, total):
    if not done:
        print("begun", flush=True)
        sys.stdin.read()
convert(sys.argv[1], sys.argv[2], 4, progress=wait)
"""


def test_another_process_that_makes_the_same_conversion_is_waited_for(checkpoint: Path, tmp_path: Path) -> None:
    target = hub.resolve(checkpoint)
    shutil.rmtree(target)
    notices: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(checkpoint), str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline().strip() == b"begun"
        stdin = process.stdin

        def tell(line: str) -> None:
            notices.append(line)
            stdin.close()  # lets the other process go on

        assert hub.resolve(checkpoint, notice=tell) == target
    assert notices == [f"another process is converting {checkpoint}; waiting for it"]
    assert process.returncode == 0
    assert bits_of(target) == 4
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_cache_that_cannot_be_written_names_the_way_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match="NPQWEN_CACHE can name another place"):
        hub.resolve(checkpoint)


def test_a_broken_checkpoint_leaves_nothing(checkpoint: Path, cache: Path) -> None:
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[:-10])
    notices: list[str] = []
    with pytest.raises(CheckpointError, match="truncated"):
        hub.resolve(checkpoint, notice=notices.append)
    assert notices == []
    assert not [path for path in cache.rglob("*") if path.is_file()]
