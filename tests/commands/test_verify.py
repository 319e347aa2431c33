"""`npqwen verify`: names, directories, exit status and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npqwen import hub
from npqwen.commands import cli
from npqwen.wording import quoted

pytestmark = pytest.mark.usefixtures("cache")

Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*args: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(arg) for arg in args])
        return exit.value.code, *capsys.readouterr()

    return command


def damage(model: Path) -> None:
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)


def test_whole_models_are_a_line_each(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    own = hub.convert(checkpoint, tmp_path / "own")
    cached = [hub.convert(checkpoint, bits=bits) for bits in (4, 8)]
    status, out, err = run("verify", own, checkpoint)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(map(str, [own, *cached]))
    assert all(": all right, 25 tensors, " in line or ": all right, " in line for line in lines)


def test_damage_in_a_directory(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    own = hub.convert(checkpoint, tmp_path / "my own")
    damage(own)
    status, out, err = run("verify", own)
    assert status == 2
    assert out.splitlines() == [f"{own}: damaged in 1 place", "  model.safetensors: model.norm.weight is damaged"]
    assert err == (
        f"npqwen: error: {own} is damaged; convert its checkpoint again (npqwen convert CHECKPOINT '{own}' --force)\n"
    )


def test_damage_in_the_cache(run: Run, checkpoint: Path) -> None:
    four, eight = (hub.convert(checkpoint, bits=bits) for bits in (4, 8))
    damage(eight)
    status, out, err = run("verify", checkpoint)
    assert status == 2
    assert f"{four}: all right, " in out
    assert f"{eight}: damaged in 1 place\n" in out
    assert err == (
        f"npqwen: error: {eight} is damaged; convert it again: npqwen convert '{checkpoint}' --bits 8 --force\n"
    )
    assert run("convert", checkpoint, "--bits", "8", "--force", "-q")[0] == 0
    assert run("verify", checkpoint)[0] == 0


def test_what_cannot_be_verified(run: Run, checkpoint: Path) -> None:
    status, out, err = run("verify", checkpoint)
    assert (status, out) == (2, "")
    assert err == f"npqwen: error: no model {quoted(str(checkpoint))} is in the cache; see npqwen list\n"
    status, out, err = run("verify")
    assert status == 2
    assert "Missing argument 'MODEL...'" in err
