"""Passes over long parts of prompts, where these are computed in bf16: with AMX, or with emulated_amx.

test_instruction_sets.py starts these tests with the emulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from npqwen.engine.piece import Piece
from npqwen.engine.runner import PROMPT_TOKENS
from npqwen.kernels.prompt_matmul import PROMPT_WIDTH
from npqwen.model import Model, load

pytestmark = pytest.mark.skipif(not PROMPT_WIDTH, reason="this process's kernels have no tiles for prompts")
TOKENS = np.random.default_rng(0).integers(0, 4000, 300)


@pytest.fixture(scope="module", params=["dense", "mixture"])
def model(request: pytest.FixtureRequest, tiny: Callable[[int], Path], tiny_moe: Path) -> Iterator[Model]:
    with load(tiny_moe if request.param == "mixture" else tiny(4), threads=2) as model:
        yield model


def in_passes(model: Model, sizes: list[int]) -> np.ndarray:
    """The logits of TOKENS, run in passes of these sizes."""
    cache = model.new_cache()
    parts = np.split(TOKENS, np.cumsum(sizes)[:-1])
    return np.concatenate([model.forward(part, cache, all_logits=True) for part in parts])


def test_the_logits_are_those_of_short_passes_but_for_rounding(model: Model) -> None:
    short, long = (
        in_passes(model, sizes).astype(np.float64) for sizes in ([PROMPT_TOKENS - 1] * 4 + [48], [len(TOKENS)])
    )
    assert not np.array_equal(short, long)
    logs = [x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
            for x in (short, long)]  # fmt: skip
    assert (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean() < 5e-4


def test_short_passes_keep_their_bits(model: Model) -> None:
    """A token's logits in a pass with others, also with a long part of a prompt, are those of it alone."""
    alone = in_passes(model, [1] * 40 + [2, 3, 15, 63, 40, 63, 63, 11])
    np.testing.assert_array_equal(in_passes(model, [PROMPT_TOKENS - 1] * 4 + [48]), alone)
    caches = [model.new_cache(300), model.new_cache(300)]
    for at in range(40):
        part = TOKENS[at : at + 1]
        pieces = [Piece(part, caches[0], 1)]
        if at % 13 == 0:
            pieces.append(Piece(TOKENS[:PROMPT_TOKENS], caches[1], 1))
        np.testing.assert_array_equal(model.forward_pieces(pieces)[0][0], alone[at])


def test_long_parts_of_several_prompts_share_a_pass(tiny: Callable[[int], Path]) -> None:
    with load(tiny(4), threads=1) as model:
        parts = [TOKENS[:80], TOKENS[80:]]
        alone = [model.logits(part) for part in parts]
        caches = [model.new_cache(300), model.new_cache(300)]
        found = model.forward_pieces([Piece(*each, len(each[0])) for each in zip(parts, caches, strict=True)])
        for one, other in zip(alone, found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_verified_drafts_and_hidden_states_keep_their_bits(model: Model) -> None:
    """However many they are: drafts must not change a text, nor the company of a text its vector."""
    exact = in_passes(model, [PROMPT_TOKENS - 1] * 4 + [48])
    cache = model.new_cache(300)
    piece = Piece(TOKENS[:100], cache, 100, guesses=99)
    np.testing.assert_array_equal(model.forward_pieces([piece])[0], exact[:100])
    whole, parts = model.new_cache(300), model.new_cache(300)
    (states,) = model.hidden_pieces([Piece(TOKENS[:200], whole, 200)])
    pieces = [model.hidden_pieces([Piece(TOKENS[at : at + 50], parts, 50)])[0] for at in range(0, 200, 50)]
    np.testing.assert_array_equal(np.concatenate(pieces), states)
