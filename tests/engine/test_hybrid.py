"""Hybrids: logits against transformers, in whatever passes, after going back, and with wrong draft tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hybrids import HYBRIDS, golden

from npqwen.engine.piece import Piece
from npqwen.errors import OptionError
from npqwen.generation.speculation import PASS
from npqwen.kernels.gated_delta import MAX_DRAFT_TOKENS
from npqwen.model import Model, load

TOLERANCE = 1e-3
"""Between transformers' own logits, a text at once or token by token, lie up to 0.0003."""


@pytest.fixture(scope="module")
def models(hybrid: Callable[[str, int], Path]) -> Iterator[Callable[[str], Model]]:
    loaded: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in loaded:
            loaded[name] = load(hybrid(name, 16), threads=2, prefix_memory=0)
        return loaded[name]

    yield get
    for model in loaded.values():
        model.close()


@pytest.fixture
def model(models: Callable[[str], Model]) -> Model:
    return models("qwen35")


@pytest.mark.parametrize("name", HYBRIDS)
def test_logits_of_transformers_in_pieces_of_any_size(models: Callable[[str], Model], name: str) -> None:
    model, (ids, columns, want) = models(name), golden(name)
    whole = model.logits(ids)
    assert np.abs(whole[:, columns] - want).max() < TOLERANCE
    for size in (1, 7, 63, 64, 65, 100):
        cache = model.new_cache()
        parts = [model.forward(ids[at : at + size], cache, all_logits=True) for at in range(0, len(ids), size)]
        assert np.array_equal(np.concatenate(parts), whole), size


@pytest.mark.parametrize("name", HYBRIDS)
def test_rounding_costs_what_it_costs_a_layer(models: Callable[[str], Model], hybrid: Any, name: str) -> None:
    # Products of random queries and keys are near 0, so a layer makes ten times as much of the 0.5 and 4% of the
    # embedding, and further layers make noise of it.
    ids, _, _ = golden(name)
    exact = models(name).hidden(ids, [0, 1])
    for bits, most in ((8, (0.01, 0.1)), (4, (0.05, 0.45))):
        with load(hybrid(name, bits), threads=2) as model:
            found = model.hidden(ids, [0, 1])
        errors = np.sqrt(((found - exact) ** 2).mean((1, 2)) / (exact**2).mean((1, 2)))
        assert (errors < most).all()


def test_going_back_to_every_checkpoint_changes_nothing(model: Model) -> None:
    ids, _, _ = golden("qwen35")
    whole = model.logits(ids)
    cache = model.new_cache()
    marks = [16, 20, 64, 65, 130]
    cache.mark(marks)
    model.forward(ids, cache)
    for mark in reversed(marks):
        assert cache.reusable(mark) == mark
        assert cache.reusable(mark + 1) in (mark, mark + 1)
        fork = cache.fork(mark)
        cache.truncate(mark)
        for each in (fork, cache):
            assert each.length == mark
            assert np.array_equal(model.forward(ids[mark:], each.fork(), all_logits=True), whole[mark:])
    assert cache.reusable(0) == 0
    cache.truncate(0)
    assert np.array_equal(model.forward(ids, cache, all_logits=True), whole)


def test_it_cannot_go_back_to_other_places(model: Model) -> None:
    cache = model.new_cache()
    cache.mark([20])
    model.forward(golden("qwen35")[0][:50], cache)
    assert cache.reusable(49) == 20
    assert cache.reusable(19) == 0
    for use in (cache.truncate, cache.fork):
        with pytest.raises(OptionError, match="length is 49; this hybrid's last checkpoint before it is at 20"):
            use(49)
    assert cache.length == 50


@pytest.mark.parametrize("draft_tokens", [1, 3, 8, PASS - 1])
def test_a_draft_token_that_is_wrong_leaves_no_trace(model: Model, draft_tokens: int) -> None:
    assert PASS <= MAX_DRAFT_TOKENS
    ids, _, _ = golden("qwen35")
    whole = model.logits(ids)
    for right in range(draft_tokens + 1):
        cache = model.new_cache()
        at = 40
        model.forward(ids[:at], cache)
        while at + draft_tokens + 1 < 90:
            tokens = ids[at : at + 1 + draft_tokens].copy()
            tokens[1 + right :] = 7  # wrong ones
            logits = model.forward_pieces([Piece(tokens.astype(np.int64), cache, draft_tokens + 1, draft_tokens)])[0]
            assert np.array_equal(logits[: right + 1], whole[at : at + right + 1])
            cache.retract(draft_tokens)
            cache.restore(right)
            at += 1 + right
            assert cache.length == at
        copy = cache.fork()  # with draft tokens that are not in its state yet
        cache.truncate(cache.length)
        for each in (copy, cache):
            assert np.array_equal(model.forward(ids[at:], each, all_logits=True), whole[at:])


def test_sequences_in_one_pass_have_states_of_their_own(model: Model) -> None:
    ids, _, _ = golden("qwen35")
    texts = [ids[:90], ids[30:160], ids[5:12]]
    alone = [model.logits(text) for text in texts]
    caches = [model.new_cache() for _ in texts]
    found: list[list[np.ndarray]] = [[] for _ in texts]
    for size in (3, 1, 40, 200):
        pieces, who = [], []
        for i, (text, cache) in enumerate(zip(texts, caches, strict=True)):
            part = text[cache.length : cache.length + size].astype(np.int64)
            if part.size:
                cache.reserve(part.size)
                pieces.append(Piece(part, cache, part.size))
                who.append(i)
        for i, logits in zip(who, model.forward_pieces(pieces), strict=True):
            found[i].append(logits)
    for logits, parts in zip(alone, found, strict=True):
        assert np.array_equal(np.concatenate(parts), logits)


def test_an_interrupted_pass_changes_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _, _ = golden("qwen35")
    whole = model.logits(ids)
    cache = model.new_cache()
    model.forward(ids[:60], cache)
    engine: Any = model.engine if hasattr(model, "engine") else model
    run = engine._runner.team.run

    def interrupted(*args: Any, **options: Any) -> None:
        run(*args, **options)  # everything is written, and then Ctrl-C comes
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._runner.team, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.forward(ids[60:100], cache)
    monkeypatch.undo()
    assert cache.length == 60
    assert np.array_equal(model.forward(ids[60:], cache, all_logits=True), whole[60:])


def test_hidden_states_of_any_layer(model: Model) -> None:
    ids, _, _ = golden("qwen35")
    states = model.hidden(ids, [0, 1, 2, 3, 4])
    for layer in range(5):
        assert np.array_equal(model.hidden(ids, layer), states[layer])


def test_threads_change_nothing(hybrid: Callable[[str, int], Path]) -> None:
    ids, _, _ = golden("next")
    found = []
    for threads in (1, 3):
        with load(hybrid("next", 4), threads=threads) as model:
            found.append(model.logits(ids))
    assert np.array_equal(found[0], found[1])
