"""The NumPy oracle itself, against Hugging Face transformers in float32 (tests/data/tiny-qwen3.npz)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reference import ReferenceModel, read_safetensors, rope_tables

from npqwen.format.config import Config, Yarn

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "tiny-qwen3"
GOLDEN = np.load(ROOT / "tests" / "data" / "tiny-qwen3.npz")


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    weights = read_safetensors(CHECKPOINT / "model.safetensors")
    return ReferenceModel(Config.from_directory(CHECKPOINT), weights)


@pytest.mark.parametrize("k", range(4))
def test_logits_are_those_of_transformers(model: ReferenceModel, k: int) -> None:
    golden = GOLDEN[f"logits_{k}"]
    assert np.abs(model.logits(GOLDEN[f"ids_{k}"]) - golden).max() < 2e-4 * np.abs(golden).max()


@pytest.mark.parametrize("k", range(4))
def test_greedy_continuation_is_that_of_transformers(model: ReferenceModel, k: int) -> None:
    cache = model.new_cache()
    ids = list(GOLDEN[f"ids_{k}"])
    logits = model.prefill(ids, cache)
    found = []
    for _ in range(48):
        found.append(int(logits.argmax()))
        logits = model.forward(found[-1:], cache)[-1]
    assert found == GOLDEN[f"greedy_{k}"].tolist()


def test_cached_steps_equal_one_pass(model: ReferenceModel) -> None:
    ids = GOLDEN["ids_3"]
    cache = model.new_cache()
    parts = np.split(ids, [1, 2, 20])
    steps = np.concatenate([model.forward(part, cache, all_logits=True) for part in parts])
    assert np.abs(steps - model.logits(ids)).max() < 1e-4
    assert cache.length == len(ids)
    cache.truncate(5)
    again = model.forward(ids[5:], cache, all_logits=True)
    assert np.abs(again - steps[5:]).max() < 1e-4


def test_yarn_keeps_the_fast_pairs_and_divides_the_slow_ones(model: ReferenceModel) -> None:
    yarn = Yarn(factor=4.0, original_max_position_embeddings=32768)
    config = replace(model.config, yarn=yarn)
    cos, sin = rope_tables(config, np.array([1.0], np.float32))
    scale = 0.1 * math.log(4) + 1
    angle = np.arctan2(sin, cos)[0]
    plain = 1e6 ** -(np.arange(64) / 64)
    assert np.allclose(np.hypot(cos, sin), scale, rtol=1e-6)
    # 32 turns over 32768 tokens: pair 23.6; one turn: pair 39.7 (Peng et al. 2023, section 3.2).
    assert np.allclose(angle[:24], plain[:24], rtol=1e-5)
    assert np.allclose(angle[40:], plain[40:] / 4, rtol=1e-4)
    assert np.all((angle[24:40] <= plain[24:40] * 1.00001) & (angle[24:40] >= plain[24:40] / 4.00001))
