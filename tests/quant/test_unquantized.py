"""A checkpoint's own predictions, against the example's forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MIXTURE, make_config, random_tensors, write_checkpoint
from npqwen_quant import unquantized
from npqwen_quant.checkpoint import Checkpoint
from reference import ReferenceModel

from npqwen.errors import CheckpointError
from npqwen.format.config import Config


@pytest.mark.parametrize("changes", [{}, MIXTURE, {"tie_word_embeddings": False}])
def test_logits_are_those_of_the_forward_pass(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unquantized, "_ROWS", 100)
    raw = make_config(**changes)
    tensors = write_checkpoint(tmp_path, raw)
    exact = ReferenceModel(Config.from_dict(raw), {name: w.astype(np.float32) for name, w in tensors.items()})
    ids = np.random.default_rng(0).integers(0, raw["vocab_size"], (3, 17))
    shown: list[tuple[int, int]] = []
    checkpoint = Checkpoint(tmp_path)
    states = unquantized.final_states(checkpoint, ids, lambda *done: shown.append(done))
    assert shown == [(1, 2), (2, 2)]
    for row, hidden in zip(ids, states, strict=True):
        want = exact.logits(row)
        np.testing.assert_allclose(
            unquantized.logits(checkpoint, hidden), want, rtol=1e-4, atol=1e-5 * np.abs(want).max()
        )


def test_broken_weights_are_reported(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        unquantized.final_states(Checkpoint(tmp_path), np.zeros((1, 3), np.int64))


def test_states_that_overflow_are_reported(tmp_path: Path) -> None:
    tensors = random_tensors(make_config())
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] * np.float32(1e30)
    write_checkpoint(tmp_path, tensors=tensors, dtype="F32")
    with pytest.raises(CheckpointError, match="computes hidden states that overflow float32"):
        unquantized.final_states(Checkpoint(tmp_path), np.zeros((1, 3), np.int64))
