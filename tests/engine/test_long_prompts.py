"""Passes over long parts of prompts, where these are computed in bf16: with AMX, or with emulated_amx.

test_instruction_sets.py starts these tests with the emulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import TINY
from reference import ReferenceModel

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


def in_passes(model: Model, ids: np.ndarray, size: int) -> np.ndarray:
    """Every token's logits, run in passes of a size."""
    cache = model.new_cache()
    parts = np.split(ids, range(size, len(ids), size))
    return np.concatenate([model.forward(part, cache, all_logits=True) for part in parts])


@pytest.mark.parametrize("bits", [4, 8])
def test_bf16_loses_no_more_than_int8_activations(tiny: Callable[[int], Path], bits: int) -> None:
    """KL divergence from the unquantized model on held-out text, in passes of 512 tokens and of 63."""
    with load(tiny(bits), threads=2) as model:
        ids = model.tokenizer.encode((TINY / "heldout.txt").read_text(encoding="utf-8"))[:1024]
        expected = log_softmax(ReferenceModel.from_directory(TINY).logits(ids))
        long, short = (log_softmax(in_passes(model, np.array(ids), size)) for size in (512, PROMPT_TOKENS - 1))
        assert not np.array_equal(long, short)
        lost = [(np.exp(expected) * (expected - found)).sum(1).mean() for found in (long, short)]
        assert lost[0] < 1.03 * lost[1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def test_short_passes_keep_their_bits(model: Model) -> None:
    """A token's logits in a pass with others, also with a long part of a prompt, are those of it alone."""
    alone = in_passes(model, TOKENS, 1)
    np.testing.assert_array_equal(in_passes(model, TOKENS, PROMPT_TOKENS - 1), alone)
    caches = [model.new_cache(300), model.new_cache(300)]
    for at in range(40):
        part = TOKENS[at : at + 1]
        pieces = [Piece(part, caches[0], 1)]
        if at % 13 == 0:
            pieces.append(Piece(TOKENS[:PROMPT_TOKENS], caches[1], 1))
        np.testing.assert_array_equal(model.forward_pieces(pieces)[0][0], alone[at])


def test_long_parts_of_several_prompts_share_a_pass(tiny: Callable[[int], Path]) -> None:
    with load(tiny(4), threads=1) as model:
        parts = [TOKENS[:80], TOKENS[80:250]]
        alone = [model.logits(part) for part in parts]
        caches = [model.new_cache(300), model.new_cache(300)]
        found = model.forward_pieces([Piece(*each, len(each[0])) for each in zip(parts, caches, strict=True)])
        for one, other in zip(alone, found, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("draft_tokens", [1, 99])
def test_verified_drafts_keep_their_bits(model: Model, draft_tokens: int) -> None:
    exact = in_passes(model, TOKENS[:100], PROMPT_TOKENS - 1)
    piece = Piece(TOKENS[:100], model.new_cache(300), 100, draft_tokens)
    np.testing.assert_array_equal(model.forward_pieces([piece])[0], exact)


def test_hidden_states_keep_their_bits(model: Model) -> None:
    """The vector of a text does not depend on its company."""
    whole, parts = model.new_cache(300), model.new_cache(300)
    (states,) = model.hidden_pieces([Piece(TOKENS[:200], whole, 200)])
    pieces = [model.hidden_pieces([Piece(TOKENS[at : at + 50], parts, 50)])[0] for at in range(0, 200, 50)]
    np.testing.assert_array_equal(np.concatenate(pieces), states)
