"""What a conversion cost, against the same numbers in plain NumPy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import TINY
from reference import ReferenceModel

from npqwen.errors import CheckpointError
from npqwen.model import load
from npqwen.reports import checkpoint_evaluation
from npqwen.reports.checkpoint_evaluation import evaluate_conversion
from npqwen.reports.evaluation import evaluate

TEXT = (TINY / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return ReferenceModel.from_directory(TINY)


@pytest.mark.parametrize("together", [256, 7])
def test_numbers_of_plain_numpy(
    tiny: Callable[[int], Path], reference: ReferenceModel, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_evaluation, "_TOKENS", together)
    ids = np.array(reference.tokenizer.encode(TEXT[:900])[:90]).reshape(3, 30)
    shown: list[tuple[int, int]] = []
    kl, nll, same = [], [], []
    with load(tiny(3), threads=1) as model:
        found = evaluate_conversion(model, TINY, ids, "some text", lambda *done: shown.append(done))
        for row in ids:
            p, q = (
                logits - np.log(np.exp(logits).sum(1, keepdims=True))
                for logits in (one.logits(row).astype(np.float64) for one in (reference, model))
            )
            kl += (np.exp(p) * (p - q)).sum(1)[:-1].tolist()
            nll += (-q[np.arange(29), row[1:]]).tolist()
            same += (p.argmax(1) == q.argmax(1))[:-1].tolist()
    assert shown[-1] == (180, 180)
    assert shown == sorted(shown)
    assert (found.text, found.against, found.tokens, found.window, found.stride) == (
        "some text", "the checkpoint", 87, 30, 30,
    )  # fmt: skip
    assert found.kl_divergence == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.kl_error == pytest.approx(np.std(kl, ddof=1) / 87**0.5, rel=1e-3)
    assert found.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert found.top_1 == pytest.approx(np.mean(same))


def test_numbers_of_an_evaluation_against_bf16(tiny: Callable[[int], Path]) -> None:
    with load(tiny(4), threads=1) as model, load(tiny(16), threads=1) as base:
        ids = np.array(base.tokenizer.encode(TEXT)[:512]).reshape(2, 256)
        found = evaluate_conversion(model, TINY, ids, "text")
        divergence = evaluate(model, {"text": ids.ravel().tolist()}, base, window=256, prompts=0).total.divergence
    assert divergence is not None
    assert found.kl_divergence == pytest.approx(divergence.kl.mean, rel=1e-3)


def test_a_checkpoint_that_is_gone_is_named(tiny: Callable[[int], Path], tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    with load(tiny(4), threads=1) as model, pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        evaluate_conversion(model, tmp_path / "source", np.zeros((1, 4), np.int64), "text")
