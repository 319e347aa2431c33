"""`npqwen convert --calibrate`, with the example model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY
from click.testing import CliRunner, Result
from npqwen_quant import convert as convert_directory
from npqwen_quant.calibration import Calibration
from numpy.typing import NDArray

from npqwen.commands import calibration
from npqwen.commands.calibration import SEQUENCES, TOKENS, FileText, divided, spread
from npqwen.commands.convert import convert
from npqwen.format.quantization import EvaluationRecord, Quantization
from npqwen.generation import own_text
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.own_text import write_own_text
from npqwen.model import load
from npqwen.reports import checkpoint_evaluation
from npqwen.reports.checkpoint_evaluation import evaluate_conversion
from npqwen.reports.info import describe, inspect
from npqwen.tokenizer import Tokenizer

TEXT = "river (noun): a large natural stream of water. " * 12


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(convert, [str(argument) for argument in arguments])


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def evaluation(directory: Path) -> EvaluationRecord | None:
    return Quantization.from_directory(directory).evaluation


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models write less, and texts of files are divided into shorter sequences."""

    def write(
        model: LanguageModel, sequences: int = 4, tokens: int = 24, **options: Any
    ) -> NDArray[np.int32]:
        return write_own_text(model, min(sequences, 4), min(tokens, 24), **options)

    monkeypatch.setattr(own_text, "write_own_text", write)
    monkeypatch.setattr(calibration, "TOKENS", 16)
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 32)


@pytest.mark.usefixtures("short_texts")
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


@pytest.mark.usefixtures("short_texts")
def test_with_its_own_text(tmp_path: Path) -> None:
    for out in ("first", "second"):
        result = run(TINY, tmp_path / out, "--calibrate", "self")
        assert result.exit_code == 0, result.output
        assert "writes the text" in result.stderr
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    shown = describe(inspect(tmp_path / "first"))
    assert "with the model's own text" in shown
    assert "92 tokens of the model's own text" in shown
    found = evaluation(tmp_path / "first")
    assert found == evaluation(tmp_path / "second")
    assert found is not None
    assert 1e-5 < found.kl_divergence < 0.05
    assert f"KL divergence {found.kl_divergence:.7f}" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_what_the_model_wrote_lowers_the_divergence_on_other_text(
    tmp_path: Path, tiny: Callable[[int], Path]
) -> None:
    with load(tiny(8), threads=1) as writer:
        ids = write_own_text(writer, 24, 128)
        held_out = spread(writer.tokenizer.encode((TINY / "heldout.txt").read_text(encoding="utf-8")), 8)
    for bits, limit in ((4, 0.0006), (3, 0.0019)):
        out = tmp_path / str(bits)
        convert_directory(TINY, out, bits, calibration=Calibration("own", lambda place: ids))
        found = {}
        for directory in (tiny(bits), out):
            with load(directory, threads=1) as model:
                found[directory] = evaluate_conversion(model, TINY, held_out, "").kl_divergence
        assert found[out] < min(0.8 * found[tiny(bits)], limit)


@pytest.mark.usefixtures("short_texts")
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


@pytest.mark.parametrize(
    ("argument", "message"),
    [("missing.txt", "cannot be read"), (".", "no .txt and no .md file"), ("", "the name of the text is empty")],
)
def test_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(TINY, tmp_path / "out", "--calibrate", argument)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_sequences_are_spread_over_the_text() -> None:
    assert spread(list(range(10)), SEQUENCES).tolist() == [list(range(10))]
    found = spread(list(range(1000 * TOKENS)), SEQUENCES)
    assert found.shape == (SEQUENCES, TOKENS)
    assert found[0, 0] == 0
    assert found[-1, -1] == 1000 * TOKENS - 1
    assert (np.diff(found[:, 0]) > TOKENS).all()
    assert spread(list(range(3 * TOKENS + 5)), SEQUENCES)[:, 0].tolist() == [0, 514, 1029]


@pytest.mark.parametrize(("sequences", "held"), [(0.1, 0), (1, 0), (3, 0), (4, 1), (16, 1), (34, 2), (68, 4), (500, 4)])
def test_what_is_held_out_is_not_calibrated_with(sequences: float, held: int) -> None:
    ids = list(range(int(sequences * TOKENS)))
    calibrating, measuring = divided(ids)
    assert len(measuring) == held
    assert len(calibrating) == min(max(int(sequences), 1), SEQUENCES + 4) - held
    assert not set(calibrating.ravel()) & set(measuring.ravel())
    assert len(set(calibrating.ravel()) | set(measuring.ravel())) == calibrating.size + measuring.size


@pytest.mark.usefixtures("short_texts")
def test_a_part_of_the_files_is_held_out_and_measured_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    result = run(TINY, tmp_path / "out", "--calibrate", tmp_path / "a.txt")
    assert result.exit_code == 0, result.output
    found = evaluation(tmp_path / "out")
    assert found is not None
    assert (found.text, found.against, found.window) == ("a.txt, held out", "the checkpoint", 16)
    with load(tmp_path / "out") as model:
        ids = FileText(str(tmp_path / "a.txt")).to_measure(model, True)[1]
        assert found.tokens == 15 * len(ids)
        assert ids.tolist() == divided(model.tokenizer.encode(TEXT))[1].tolist()


def test_a_text_too_short_to_hold_a_part_out_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 32)
    (tmp_path / "a.txt").write_text(TEXT)
    result = run(TINY, tmp_path / "out", "--calibrate", tmp_path / "a.txt")
    assert result.exit_code == 0, result.output
    assert "nothing is measured: the text is too short" in result.stderr
    assert evaluation(tmp_path / "out") is None


@pytest.mark.parametrize("text", ["\n", TEXT])
def test_a_text_that_does_harm_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    result = run(TINY, tmp_path / "out", "--calibrate", tmp_path / "a.txt")
    assert result.exit_code != 0
    assert re.match(r"a.txt has \d+ tokens?, and a calibration needs at least 1,024", str(result.exception))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_short_text_is_remarked_upon(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "a.txt").write_text(TEXT * 12)
    FileText(str(tmp_path / "a.txt"), said.append).calibration(TINY)
    (tmp_path / "b.txt").write_text(TEXT * 80)
    FileText(str(tmp_path / "b.txt"), said.append).calibration(TINY)
    assert len(said) == 1
    assert re.match(r"a.txt has only \d,\d+ tokens: calibration with 10,000 or more, or with self, is better", said[0])


def test_a_failed_measurement_leaves_a_conversion(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    result = run(TINY, tmp_path / "out", "--evaluate", tmp_path / "a.txt", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "out")
    assert "converted, but not measured: a.txt is too short to measure on" in result.stderr
    assert evaluation(tmp_path / "out") is None


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize("calibrate", [True, False])
def test_measured_on_another_text(tmp_path: Path, calibrate: bool) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("What is 17 + 25? " * 3)
    options: list[str | Path] = ["--calibrate", tmp_path / "a.txt"] if calibrate else []
    result = run(TINY, tmp_path / "out", *options, "--evaluate", tmp_path / "b.txt")
    assert result.exit_code == 0, result.output
    found = evaluation(tmp_path / "out")
    assert found is not None
    assert found.text == "b.txt"
    assert (Quantization.from_directory(tmp_path / "out").calibration is not None) == calibrate


def test_measured_on_its_own_text_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_texts: None
) -> None:
    monkeypatch.setenv("NPQWEN_CACHE", str(tmp_path / "cache"))
    plain = Path(run(TINY, "--quiet", "--bits", "8").stdout.strip())
    assert evaluation(plain) is None
    before = (plain / "model.safetensors").stat().st_mtime_ns
    assert Path(run(TINY, "--quiet", "--bits", "8", "--evaluate", "self").stdout.strip()) == plain
    assert (plain / "model.safetensors").stat().st_mtime_ns == before
    assert evaluation(plain) is not None


@pytest.mark.usefixtures("short_texts")
def test_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    result = run(TINY, tmp_path / "out", "--calibrate", tmp_path / "a.txt", "--no-evaluate")
    assert result.exit_code == 0, result.output
    assert "divergence" not in result.stderr
    assert evaluation(tmp_path / "out") is None
    result = run(TINY, tmp_path / "none", "--evaluate", "self", "--no-evaluate")
    assert "exclude each other" in str(result.exception)
    result = run(TINY, tmp_path / "none", "--evaluate", tmp_path / "missing.txt")
    assert "missing.txt cannot be read" in str(result.exception)
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("short_texts")
def test_an_interrupted_measurement_leaves_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_evaluation, "final_states", interrupted)
    result = run(TINY, tmp_path / "out", "--evaluate", "self")
    assert result.exit_code != 0
    assert evaluation(tmp_path / "out") is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with load(tmp_path / "out") as model:
        assert model.bits == 4
