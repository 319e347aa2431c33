"""Passes over several sequences: each one's logits and cache are those of a pass of its own, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npqwen.engine.piece import Piece, by_piece
from npqwen.errors import OptionError
from npqwen.kernels.greatest import MAXIMA_BLOCK
from npqwen.model import Model, load


@pytest.fixture(scope="module", params=["4 bits", "16 bits", "mixture"])
def model(request: pytest.FixtureRequest, tiny: Callable[[int], Path], tiny_moe: Path) -> Iterator[Model]:
    path = tiny_moe if request.param == "mixture" else tiny(int(request.param.split()[0]))
    with load(path, threads=2) as model:
        yield model


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_the_logits_of_each_sequence_alone(model: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 3, 40, 300, 1100], 6)
    texts = [rng.integers(0, 4000, length) for length in lengths]
    caches = [model.new_cache(length) for length in lengths]
    expected = [model.logits(text) for text in texts]
    out = model.new_logits(64)
    maxima = np.empty((len(out), out.shape[1] // MAXIMA_BLOCK), np.float32)
    while left := [i for i, (text, cache) in enumerate(zip(texts, caches, strict=True)) if cache.length < len(text)]:
        room, pieces, chosen = model.chunk, [], []
        for i in rng.permutation(left)[: rng.integers(1, 7)]:
            done = caches[i].length
            size = min(len(texts[i]) - done, room, int(rng.choice([1, 2, 7, 64, 256])))
            if size:
                rows = int(rng.integers(0, min(size, 10) + 1))
                pieces.append(Piece(texts[i][done : done + size], caches[i], rows))
                chosen.append((i, done + size))
                room -= size
        maxima[:] = np.nan
        found = model.forward_pieces(pieces, out if seed % 2 else None, maxima if seed > 1 else None)
        for (i, end), piece, logits, greatest in zip(chosen, pieces, found, by_piece(maxima, pieces), strict=True):
            assert np.array_equal(logits, expected[i][end - piece.rows : end])
            assert caches[i].length == end
            if seed > 1:
                blocks = logits.shape[1] // MAXIMA_BLOCK
                whole = logits[:, : blocks * MAXIMA_BLOCK].reshape(piece.rows, blocks, MAXIMA_BLOCK)
                assert np.array_equal(greatest[:, :blocks], whole.max(axis=2))


def test_pieces_that_are_refused(model: Model, tiny: Callable[[int], Path]) -> None:
    one = np.zeros(1, np.int64)
    cache, other = model.new_cache(300), model.new_cache(300)
    cache.reserve(300)
    other.reserve(300)
    with load(tiny(8), threads=1) as stranger, pytest.raises(OptionError, match="another model"):
        model.forward_pieces([Piece(one, cache, 1), Piece(one, stranger.new_cache(1), 1)])
    with pytest.raises(OptionError, match="two pieces of a pass have the same cache"):
        model.forward_pieces([Piece(one, cache, 1), Piece(one, cache, 1)])
    for sizes in ([], [0], [1, 0], [1, model.chunk]):
        pieces = [Piece(np.zeros(n, np.int64), c, 0) for n, c in zip(sizes, (cache, other), strict=False)]
        with pytest.raises(OptionError, match="a pass takes 1 to"):
            model.forward_pieces(pieces)
    text = Piece(np.zeros(20, np.int64), cache, 20)
    out = np.zeros_like(model.new_logits(20))
    problem = "must be a C-contiguous float32 array of at least {} rows by"
    wrong: Any
    for wrong in (model.new_logits(1), out[:, :-16], out.astype(np.float64), np.asfortranarray(out)):
        with pytest.raises(OptionError, match=f"out {problem.format(len(out))}"):
            model.forward_pieces([text], wrong)
    with pytest.raises(OptionError, match=f"maxima {problem.format(20)}"):
        model.forward_pieces([text], out, np.zeros((20, 1), np.float32))
    for outside in (-1, model.config.vocab_size, 2**40):
        with pytest.raises(OptionError, match=r"a piece's ids must be int64, from 0 to \d+"):
            model.forward_pieces([text._replace(ids=np.array([0, outside]))])
    for rows in (-1, 21):
        with pytest.raises(OptionError, match=rf"rows is {rows} for a piece of 20 tokens; it must be 0 to 20"):
            model.forward_pieces([text._replace(rows=rows)])
    assert cache.length == other.length == 0
