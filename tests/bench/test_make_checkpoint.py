"""Random checkpoints, and their conversion with one file of weights on disk at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import make_checkpoint
import pytest
from make_checkpoint import SIZES, TINY, write, write_converted
from npqwen_quant import convert

from npqwen.format.safetensors import read_header

SMALL = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
MIXTURE = SIZES["30B-A3B"] | SMALL | {"num_experts": 8, "moe_intermediate_size": 64}
DENSE = SIZES["0.6B"] | SMALL | {"intermediate_size": 128}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


needs_peaks = pytest.mark.skipif(sys.platform == "win32", reason="peaks of memory and disk are not known")


@needs_peaks
@pytest.mark.parametrize("config", [MIXTURE, DENSE], ids=["mixture", "dense"])
@pytest.mark.parametrize("shard_bytes", [100_000, 10**9])
def test_a_conversion_equals_that_of_the_whole_checkpoint(
    tmp_path: Path, config: dict[str, object], shard_bytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(config, tmp_path / "whole", TINY, shard_bytes, 7)
    convert(tmp_path / "whole", tmp_path / "want", 3)
    write_converted(config, tmp_path / "out", TINY, shard_bytes, 7, 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "want", "whole"]
    assert "peak of memory" in capsys.readouterr().err


def test_values_do_not_depend_on_the_size_of_files(tmp_path: Path) -> None:
    found = []
    for name, shard_bytes in (("many", 50_000), ("one", 10**9)):
        write(MIXTURE, tmp_path / name, TINY, shard_bytes, 0)
        values = {}
        for path in (tmp_path / name).glob("*.safetensors"):
            with path.open("rb") as file:
                for key, tensor in read_header(file).tensors.items():
                    file.seek(tensor.offset)
                    values[key] = file.read(tensor.nbytes)
        found.append(values)
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(found[0])


@needs_peaks
def test_an_interrupted_conversion_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_converted(MIXTURE, tmp_path / "want", TINY, 100_000, 0, 4)
    written: list[str] = []
    write_shard = make_checkpoint.write_shard

    def interrupted(path: Path, *arguments: object) -> None:
        if len(written) == 2:
            written.append("interrupted")
            raise KeyboardInterrupt
        written.append(path.name)
        write_shard(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(make_checkpoint, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_converted(MIXTURE, tmp_path / "out", TINY, 100_000, 0, 4)
    write_converted(MIXTURE, tmp_path / "out", TINY, 100_000, 0, 4)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert len(written) == len(set(written))  # none was written twice
