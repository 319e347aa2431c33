"""A model writes its own text."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import TINY
from reference import ReferenceModel

from npqwen.generation.own_text import BEGINNINGS, TURN, write_own_text


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return ReferenceModel.from_directory(TINY, context=30)


def test_sequences_begin_with_turns_and_with_bare_text(model: ReferenceModel) -> None:
    shown: list[tuple[int, int]] = []
    ids = write_own_text(model, 4, 12, progress=lambda *done: shown.append(done))
    assert ids.shape == (4, 12)
    assert shown[-1] == (48, 48)
    assert ids.min() >= 0
    assert not np.isin(ids, model.tokenizer.missing_ids(model.config.vocab_size)).any()
    for row, beginning in zip(ids, (BEGINNINGS[0], TURN, TURN, BEGINNINGS[1]), strict=True):
        prompt = model.tokenizer.encode(beginning)
        assert row[: len(prompt)].tolist() == prompt
    assert ids[1].tolist() != ids[2].tolist()


def test_draws_are_those_of_the_seed(model: ReferenceModel) -> None:
    ids = write_own_text(model, 3, 10)
    np.testing.assert_array_equal(write_own_text(model, 3, 10), ids)
    assert (write_own_text(model, 3, 10, seed=99) != ids).any()


def test_no_more_than_the_context(model: ReferenceModel) -> None:
    assert write_own_text(model, 1, 100).shape == (1, 30)
