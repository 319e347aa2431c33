"""Calibration layer by layer, against the example's forward pass and against uninterrupted runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, make_config, random_tensors, shapes, write_checkpoint
from npqwen_quant import convert, moments
from npqwen_quant.calibration import Calibration, Fits, Progress, calibrate, calibration_key
from npqwen_quant.checkpoint import Checkpoint
from npqwen_quant.output import Output
from npqwen_quant.search import Codebook
from quantized import QuantizedReference
from reference import ReferenceModel, qwen3_in_numpy

from npqwen.errors import CheckpointError, OptionError, OutputError
from npqwen.format.config import Config

CODEBOOK = Codebook(np.array([-27, -21, -16, -12, -9, -6, -3, -1, 2, 5, 8, 11, 14, 18, 22, 29], np.float32))
FINE = Codebook(np.arange(-32, 32, dtype=np.float32))


class Recorder:
    """A matrix that keeps what it is multiplied with."""

    __array_ufunc__ = None  # x @ matrix comes here

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights
        self.inputs: list[np.ndarray] = []

    @property
    def T(self) -> Recorder:
        return self

    def __getitem__(self, ids: Any) -> np.ndarray:
        return np.asarray(self.weights[ids])

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        self.inputs.append(x)
        return np.asarray(x @ self.weights.T)


def expected(directory: Path, tensors: dict[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Second moments by the names of matrices, from the example's forward pass of each sequence."""
    config = Checkpoint(directory).config
    weights: dict[str, Any] = {n: Recorder(w) if w.ndim == 2 else w for n, w in tensors.items()}
    for row in ids:
        h = qwen3_in_numpy.forward(config, weights, row, qwen3_in_numpy.Cache(config))
        qwen3_in_numpy.output_logits(config, weights, h)
    found = {}
    for name, matrix in weights.items():
        if isinstance(matrix, Recorder) and matrix.inputs:
            x = np.concatenate([np.atleast_2d(x) for x in matrix.inputs]).astype(np.float64)
            found[name] = x.T @ x
    return found


def text(place: Path | None = None, sequences: int = 6, tokens: int = 20) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 203, (sequences, tokens))


@pytest.mark.parametrize("widest", [1000, 64])
def test_moments_are_those_of_the_forward_pass(tmp_path: Path, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_BATCH", 40)
    monkeypatch.setattr(moments, "_PRIOR", 0)
    tensors = write_checkpoint(tmp_path, make_config(**MIXTURE))
    checkpoint, ids = Checkpoint(tmp_path), text()
    want = expected(tmp_path, tensors, ids)
    hidden = tensors["model.embed_tokens.weight"][ids].astype(np.float32)
    found: dict[str, moments.Moments] = {}

    def whole(name: str) -> np.ndarray:
        source = checkpoint.tensors[name]
        return source.floats(0, source.shape[0])

    for i in range(2):

        def load(name: str, prefix: str = f"model.layers.{i}.") -> np.ndarray:
            return whole(prefix + name)

        parts: list[Mapping[str, moments.Moments]] = [moments.attention(checkpoint.config, load, hidden, widest)]
        if checkpoint.config.is_sparse(i):
            parts += list(moments.mixture(checkpoint.config, load, hidden, widest))
        else:
            parts.append(moments.feed_forward(checkpoint.config, load, hidden, widest))
        found |= {f"model.layers.{i}.{name}": sums for part in parts for name, sums in part.items()}
    found["model.embed_tokens.weight"] = moments.last(checkpoint.config, whole, hidden, widest)
    missing = {name for name in want if name not in found}
    assert missing == {"model.layers.1.mlp.gate.weight"}
    for name, sums in found.items():
        if name not in want:  # no token reached the expert
            assert sums.count == 0
            continue
        for (start, stop), total in zip(sums.bounds, sums.sums, strict=True):
            expect = want[name][start:stop, start:stop]
            np.testing.assert_allclose(total, expect, rtol=1e-3, atol=1e-4 * np.abs(expect).max())
        assert sums.bounds[-1][1] == len(want[name])


def run(
    directory: Path, out: Path, calibration: Calibration, progress: Progress | None = None
) -> dict[str, tuple[np.ndarray, ...]]:
    """Calibrate all matrices but routers; their fits."""
    checkpoint = Checkpoint(directory)
    matrices = {
        n: s for n, s in shapes(checkpoint.raw_config).items() if len(s) == 2 and not n.endswith("mlp.gate.weight")
    }
    sources = {name: checkpoint.tensor(name, shape) for name, shape in shapes(checkpoint.raw_config).items()}
    books = {name: FINE if "v_proj" in name else CODEBOOK for name in matrices}
    key = calibration_key(calibration, books)
    with ThreadPoolExecutor(2) as pool, Output(out, key, force=False) as output:
        output.begin(())
        fits = calibrate(checkpoint, sources, books, calibration, output.work.calibration, pool, 2, progress)
        return {name: fits.rows(name, 0, shape[0], shape) for name, shape in matrices.items()}


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("changes", [{}, MIXTURE, {"tie_word_embeddings": False}])
def test_an_interrupted_calibration_is_resumed(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "source", make_config(**changes))
    whole = run(tmp_path / "source", tmp_path / "whole", Calibration("text", text))
    assert leftovers(tmp_path) == []
    calls = []

    def make(place: Path) -> np.ndarray:
        calls.append("made")
        return text()

    def interrupted(done: int, total: int) -> None:
        assert done <= total
        if done > limit:
            raise KeyboardInterrupt

    for fraction in (0, 30_000, 50_000, 80_000):
        limit = fraction
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "source", tmp_path / "parts", Calibration("text", make), interrupted)
        assert len(leftovers(tmp_path)) == 1
    shown: list[tuple[int, int]] = []
    parts = run(tmp_path / "source", tmp_path / "parts", Calibration("text", make), lambda *done: shown.append(done))
    assert calls == ["made"]
    assert shown[-1][0] == shown[-1][1]
    assert leftovers(tmp_path) == []
    for name, fitted in whole.items():
        for i, array in enumerate(fitted):
            np.testing.assert_array_equal(array, parts[name][i], name)


def test_another_text_begins_anew(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for name in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "source", tmp_path / "out", Calibration(name, text), interrupted)
        assert len(leftovers(tmp_path)) == 1
    assert run(tmp_path / "source", tmp_path / "out", Calibration("three", text))
    assert leftovers(tmp_path) == []


def test_broken_weights_are_reported(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "source")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write_checkpoint(tmp_path / "source", tensors=tensors)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        run(tmp_path / "source", tmp_path / "out", Calibration("text", text))
    assert leftovers(tmp_path) == []


def test_states_that_overflow_are_reported(tmp_path: Path) -> None:
    tensors = random_tensors(make_config())
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] * np.float32(1e30)
    write_checkpoint(tmp_path / "source", tensors=tensors, dtype="F32")
    with pytest.raises(CheckpointError, match=r"source computes hidden states that overflow float32"):
        run(tmp_path / "source", tmp_path / "out", Calibration("text", text))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("token", [203, -1])
def test_a_token_without_an_embedding_is_reported(tmp_path: Path, token: int) -> None:
    write_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match=rf"has 203 embeddings, but the text has token id {token};"):
        run(tmp_path / "source", tmp_path / "out", Calibration("text", lambda place: np.full((2, 5), token)))
    assert leftovers(tmp_path) == []


def test_rows_of_fits(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    fits = Fits(tmp_path, {"a": CODEBOOK, "b": FINE})
    for name, high in (("a", 16), ("b", 64)):
        indices = rng.integers(0, high, (50, 70)).astype(np.uint8)
        scales, row_scales = rng.integers(-127, 128, (50, 3)).astype(np.int8), rng.random(50).astype(np.float32)
        fits.store(
            name, (50, 70), [(indices[:20], scales[:20], row_scales[:20]), (indices[20:], scales[20:], row_scales[20:])]
        )
        got = fits.rows(name, 7, 30, (50, 70))
        np.testing.assert_array_equal(got[0], indices[7:37])
        np.testing.assert_array_equal(got[1], scales[7:37])
        np.testing.assert_array_equal(got[2], row_scales[7:37])
    assert (tmp_path / "a.fit").stat().st_size == 50 * (48 + 3 + 4)
    assert "c" not in fits


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_a_calibrated_conversion_is_nearer_to_the_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    raw = make_config(hidden_size=128, intermediate_size=160, **changes)
    tensors = write_checkpoint(tmp_path / "source", raw)
    shown: list[tuple[int, int]] = []
    ids = text(None, 24, 40) % 23  # few tokens, so that inputs depend on each other
    convert(tmp_path / "source", tmp_path / "plain", 4)
    convert(
        tmp_path / "source",
        tmp_path / "calibrated",
        4,
        calibration=Calibration("text", lambda place: ids),
        calibration_progress=lambda *done: shown.append(done),
    )
    assert shown[-1][0] == shown[-1][1]
    assert leftovers(tmp_path) == []
    exact = ReferenceModel(Config.from_dict(raw), {name: w.astype(np.float32) for name, w in tensors.items()})
    error = {"plain": 0.0, "calibrated": 0.0}
    for name in error:
        converted = QuantizedReference.from_directory(tmp_path / name)
        for row in ids:
            error[name] += float(((converted.logits(row) - exact.logits(row)) ** 2).sum())
    assert error["calibrated"] < 0.8 * error["plain"]


def test_hidden_states_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    write_checkpoint(tmp_path / "source", config)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    convert(tmp_path / "source", tmp_path / "short", 4, calibration=Calibration("text", text, 1000))
    tokens = 100_000_000 // (2 * 4 * config["hidden_size"])
    with pytest.raises(OutputError, match=r"would take 10\d MB, but only 10.0 MB is free"):
        convert(tmp_path / "source", tmp_path / "long", 4, calibration=Calibration("text", text, tokens))
    assert leftovers(tmp_path) == []


def test_only_few_bits_are_calibrated(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")
    for bits in (8, 16):
        with pytest.raises(OptionError, match="makes no difference"):
            convert(tmp_path / "source", tmp_path / "out", bits, calibration=Calibration("text", text))


def test_mixtures_are_converted_with_calibration(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", make_config(**MIXTURE))
    for out in ("first", "second"):
        convert(tmp_path / "source", tmp_path / out, 4, calibration=Calibration("text", text))
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("first", "second")]
    assert files[0] == files[1]
    convert(tmp_path / "source", tmp_path / "plain", 4)
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() != files[0]
