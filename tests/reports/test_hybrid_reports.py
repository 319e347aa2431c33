"""`npqwen info`, `convert --dry-run` and `eval --layers` of hybrids."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import read_safetensors
from hybrids import HYBRIDS, hybrid_checkpoint

from npqwen import load
from npqwen.engine.recurrent_states import RecurrentShape
from npqwen.engine.substitution import parts
from npqwen.reports.conversion_plan import plan_conversion
from npqwen.reports.evaluation import evaluate
from npqwen.reports.info import active_parameters, describe, inspect


@pytest.mark.parametrize("name", HYBRIDS)
def test_sizes_are_those_of_the_files(tmp_path: Path, hybrid: Callable[[str, int], Path], name: str) -> None:
    info = inspect(hybrid(name, 4))
    source = hybrid_checkpoint(name, tmp_path / "source")
    stored = {key: w for key, w in read_safetensors(source / "model.safetensors").items() if "visual" not in key}
    assert info.parameters == sum(values.size for values in stored.values())
    unused = sum(w.size for key, w in stored.items() if ".experts." in key) * 9 // 12
    unused += sum(w.size for key, w in stored.items() if "embed_tokens" in key and "lm_head.weight" in stored)
    assert active_parameters(info.config) == info.parameters - unused
    raw = (hybrid(name, 4) / "model.safetensors").read_bytes()
    assert info.weights == sum(info.parts.values()) == len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]
    vectors = ("norm", "A_log", "dt_bias", "conv1d", "shared_expert_gate")
    weights = sum(w.size for key, w in stored.items() if not any(part in key for part in vectors))
    matrices = (
        info.weights
        - info.parts["norms"]
        - sum(math.ceil(w.size / 16) * 64 for key, w in stored.items() if any(part in key for part in vectors[1:]))
    )
    assert info.bits_per_weight == pytest.approx(8 * matrices / weights)
    plan = plan_conversion(source, tmp_path / "out", 4)
    assert {part: found.bytes for part, found in plan.parts.items()} == info.parts
    assert sum(found.weights for found in plan.parts.values()) == info.parameters
    assert (plan.weights, plan.cache) == (info.weights, info.cache)


def test_what_info_says_of_the_recurrence(hybrid: Callable[[str, int], Path]) -> None:
    info = inspect(hybrid("next", 4))
    shape = RecurrentShape.of(info.config)
    assert shape is not None
    assert shape.nbytes == 3 * 4 * (4 * 32 * 32 + 3 * 256)
    lines = describe(info).splitlines()
    assert "attention       4 query and 2 key/value heads of 32, in 1 of 4 layers" in lines
    assert [line for line in lines if line.startswith("recurrence")] == [
        "recurrence      Gated DeltaNet in 3 of 4 layers, 2 key heads of 32 and 4 value heads of 32; 58 kB a state, "
        "2.0 MB with all checkpoints"
    ]
    assert "mixture         12 experts of 64, 3 a token, and one of 96 that every token uses" in lines


@pytest.mark.parametrize("name", ["next", "qwen35"])
def test_costs_of_parts(hybrid: Callable[[str, int], Path], name: str) -> None:
    ids = np.random.default_rng(0).integers(0, 4096, 50).tolist()
    with load(hybrid(name, 16), threads=2) as base, load(hybrid(name, 4), threads=2) as model:
        found = evaluate(model, {"ids": ids}, base, prompts=0, layers=True).layers
        names = [part.name for part in parts(base, model)]
    assert found is not None
    feed_forward = {
        "next": ["experts of all layers", "shared expert of all layers"],
        "qwen35": ["gate_up_proj of all dense layers", "down_proj of all dense layers"],
    }
    assert names[6:] == [
        "qk_proj, v_proj and q_gate of all attention layers",
        "o_proj of all attention layers",
        "in_proj of all Gated DeltaNet layers",
        "out_proj of all Gated DeltaNet layers",
        *feed_forward[name],
    ]
    assert [part.part for part in found.parts] == names
    assert all(part.kl.mean > 0 for part in found.parts)
