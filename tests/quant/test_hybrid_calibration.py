"""Hybrids computed in float32 by the converter: against transformers, and what calibration makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hybrids import HYBRIDS, golden, hybrid_checkpoint
from npqwen_quant import convert, delta_moments, unquantized
from npqwen_quant.calibration import Calibration
from npqwen_quant.checkpoint import Checkpoint

from npqwen.engine.engine import Engine
from npqwen.engine.substitution import Part, parts, substituted
from npqwen.model import load

TOLERANCE = 1e-3
"""As in tests/engine/test_hybrid.py."""


@pytest.mark.parametrize("name", HYBRIDS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    ids, columns, want = golden(name)
    checkpoint = Checkpoint(hybrid_checkpoint(name, tmp_path / "source"))
    states = unquantized.final_states(checkpoint, np.stack([ids, ids[::-1], ids]))
    for row in (0, 2):
        assert np.abs(unquantized.logits(checkpoint, states[row])[:, columns] - want).max() < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_chunks_of_the_recurrence_are_its_steps(tokens: int) -> None:
    rng = np.random.default_rng(tokens)

    def random(*shape: int) -> np.ndarray:
        return np.asarray(rng.normal(size=(2, 3, tokens, *shape)).astype(np.float32))

    q, k, v = random(16), random(16), random(32)
    q /= 4
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, log_decay = np.abs(np.tanh(random())), -np.exp(2 * random())
    state = np.zeros((2, 3, 16, 32))
    want = np.empty_like(v)
    for t in range(tokens):
        state *= np.exp(log_decay[:, :, t, None, None])
        said = np.einsum("shk,shkv->shv", k[:, :, t], state)
        state += np.einsum("shk,shv->shkv", k[:, :, t], beta[:, :, t, None] * (v[:, :, t] - said))
        want[:, :, t] = np.einsum("shk,shkv->shv", q[:, :, t], state)
    found = delta_moments.delta_rule(q, k, v, beta, log_decay)
    assert np.abs(found - want).max() < 1e-5


def text(place: Path | None = None) -> np.ndarray:
    """Few tokens, so that inputs depend on each other."""
    return np.random.default_rng(5).integers(0, 40, (12, 80))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", HYBRIDS)
def test_calibration_lowers_the_error_of_every_layer_and_is_resumed(
    tmp_path: Path, hybrid: Callable[[str, int], Path], name: str
) -> None:
    source = hybrid_checkpoint(name, tmp_path / "source")

    calls = []

    def make(place: Path) -> np.ndarray:
        calls.append("made")
        return text()

    def calibrate(out: str, until: float = 1) -> None:
        def stop(done: int, total: int) -> None:
            if done > until * total:
                raise Interrupted

        convert(source, tmp_path / out, 4, calibration=Calibration("text", make), calibration_progress=stop)

    calibrate("calibrated")
    for share in (0.15, 0.5, 0.8):
        with pytest.raises(Interrupted):
            calibrate("parts", share)
    calibrate("parts")
    assert calls == ["made"] * 2
    found, whole = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("parts", "calibrated"))
    assert found == whole

    # The models are random, and further layers make noise of any error: each layer is replaced by itself.
    exact = load(hybrid(name, 16), threads=2)
    errors = []
    for directory in (hybrid(name, 4), tmp_path / "calibrated"):
        with load(directory, threads=2) as model:
            errors.append(layer_errors(exact, model))
    exact.close()
    # What comes out of a random layer has no directions that matter less, but the embeddings of 40 tokens do.
    assert (errors[1] < np.array([0.75, 0.99, 0.99, 0.99]) * errors[0]).all()


def layer_errors(exact: Engine, model: Engine) -> np.ndarray:
    """Root mean square errors of each layer's output of the text, if only this layer is the model's."""
    layers = [part for part in parts(exact, model) if part.name.startswith("layer ")]
    return np.array([layer_error(exact, model, part) for part in layers])


def layer_error(exact: Engine, model: Engine, part: Part) -> float:
    assert part.layers is not None
    (layer,) = part.layers
    one = substituted(exact, model, part)
    differences = [one.hidden(row, layer + 1) - exact.hidden(row, layer + 1) for row in text()]
    return float(np.sqrt(np.square(differences).mean()))
