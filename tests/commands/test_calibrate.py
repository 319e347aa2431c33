"""`npqwen convert --calibrate`, with the example model."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from checkpoints import TINY
from click.testing import CliRunner, Result

from npqwen.commands.calibration import SEQUENCES, TOKENS, windows
from npqwen.commands.convert import convert
from npqwen.generation import own_text
from npqwen.model import load
from npqwen.reports.info import describe, inspect
from npqwen.tokenizer import Tokenizer

TEXT = "river (noun): a large natural stream of water. " * 12


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(convert, [str(argument) for argument in arguments])


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_with_a_file_or_a_directory(tmp_path: Path) -> None:
    texts = tmp_path / "texts" / "more"
    texts.mkdir(parents=True)
    (texts / "a.txt").write_text(TEXT)
    (texts / "ignored.bin").write_bytes(b"\0\0")
    for out, argument in (("file", texts / "a.txt"), ("directory", tmp_path / "texts")):
        result = run(TINY, tmp_path / out, "--calibrate", argument)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == str(tmp_path / out)
    assert weights(tmp_path / "file") == weights(tmp_path / "directory")
    assert run(TINY, tmp_path / "plain").exit_code == 0
    assert weights(tmp_path / "plain") != weights(tmp_path / "file")
    assert "with text " in describe(inspect(tmp_path / "file"))
    assert "calibrated" not in describe(inspect(tmp_path / "plain"))
    with load(tmp_path / "file") as calibrated, load(tmp_path / "plain") as plain:
        ids = Tokenizer.from_directory(TINY).encode(TEXT)[:40]
        assert (calibrated.logits(ids).argmax(1) == plain.logits(ids).argmax(1)).mean() > 0.8


def test_with_its_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "write_own_text", functools.partial(own_text.write_own_text, sequences=4, tokens=24))
    for out in ("first", "second"):
        result = run(TINY, tmp_path / out, "--calibrate", "self")
        assert result.exit_code == 0, result.output
        assert "writes a text" in result.stderr
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    assert "with the model's own text" in describe(inspect(tmp_path / "first"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_in_the_cache_it_replaces_the_plain_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(TEXT)
    plain = Path(run(TINY, "--quiet").stdout.strip())
    before = weights(plain)
    calibrated = Path(run(TINY, "--calibrate", tmp_path / "a.txt", "--quiet").stdout.strip())
    assert calibrated == plain
    assert weights(calibrated) != before
    assert run(TINY, "--quiet").stdout.strip() == str(plain)
    assert weights(plain) != before


@pytest.mark.parametrize(("argument", "message"), [("missing.txt", "cannot be read"), (".", "no .txt and no .md file")])
def test_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(TINY, tmp_path / "out", "--calibrate", argument)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_windows_are_spread_over_the_text() -> None:
    assert windows(list(range(10))).tolist() == [list(range(10))]
    found = windows(list(range(1000 * TOKENS)))
    assert found.shape == (SEQUENCES, TOKENS)
    assert found[0, 0] == 0
    assert found[-1, -1] == 1000 * TOKENS - 1
    assert (np.diff(found[:, 0]) > TOKENS).all()
    assert windows(list(range(3 * TOKENS + 5)))[:, 0].tolist() == [0, 514, 1029]
