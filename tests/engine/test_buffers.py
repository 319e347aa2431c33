"""Arrays that every pass writes: what an earlier pass left there must not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import TINY
from npqwen_quant import convert

from npqwen.model import load

IDS = np.random.default_rng(0).integers(0, 4096, 17)
MODELS = [TINY, Path(__file__).parents[1] / "data" / "tiny-qwen3-moe"]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("source", MODELS, ids=["dense", "mixture"])
def test_what_an_earlier_pass_left_is_not_multiplied(tmp_path: Path, source: Path, bits: int) -> None:
    """In padding rows, too: stale bytes could read as subnormal floats, which are slow."""
    convert(source, tmp_path / "model", bits=bits)
    with load(tmp_path / "model", threads=2) as model:
        for tokens in (2, 3, 5, 13, 17):
            buffers = model._runner.buffers
            arrays = [*buffers.activations, *(buffers.experts or ()), buffers.logits(tokens)]
            for array in arrays:
                array.fill(255 if array.dtype == np.uint8 else 0)  # as float32 not a number
            model.forward(IDS[:tokens], model.new_cache(), all_logits=True)
            assert all(np.isfinite(array).all() for array in arrays if array.dtype == np.float32)
