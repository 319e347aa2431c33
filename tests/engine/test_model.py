"""A loaded model and its caches: continuing, limits, and wrong arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted import small_model

from npqwen import ContextLengthError, OptionError
from npqwen.generation.session import Session
from npqwen.kernels.cache_page import PAGE
from npqwen.model import Model, load

IDS = np.random.default_rng(0).integers(0, 4096, 1200)


@pytest.fixture(scope="module", params=[4, 16])
def model(request: pytest.FixtureRequest, tiny: Callable[[int], Path]) -> Iterator[Model]:
    """The example model, with either type of cache."""
    with load(tiny(request.param), threads=2) as loaded:
        yield loaded


def test_a_truncated_cache_that_is_continued_equals_a_new_one(model: Model) -> None:
    used, new = model.new_cache(), model.new_cache()
    model.prefill(IDS[:300], used)
    model.forward(IDS[300:700], used, all_logits=True)
    used.truncate(300)
    model.prefill(IDS[:300], new)
    for at in (700, 701, 720):
        again = model.forward(IDS[at : at + 20], used, all_logits=True)
        assert np.array_equal(again, model.forward(IDS[at : at + 20], new, all_logits=True))
    used.truncate(0)
    assert used.length == 0
    assert np.array_equal(model.prefill(IDS[:300], used), model.prefill(IDS[:300], model.new_cache()))
    with pytest.raises(OptionError, match="length is 301; the cache has 300 tokens"):
        used.truncate(301)
    with pytest.raises(OptionError, match="length is -1; it must be a whole number"):
        used.truncate(-1)


def test_growing_moves_no_page(model: Model) -> None:
    cache = model.new_cache()
    assert cache.nbytes == 0
    model.prefill(IDS[: PAGE - 1], cache)
    assert cache.nbytes == cache.page_bytes
    first = cache.addresses[0]
    page = cache._held.arrays[0]
    before = page.copy()
    for count in (1, 1, 300, PAGE):
        model.prefill(IDS[:count], cache)
    assert cache.length == 2 * PAGE + 301
    assert cache.nbytes == 4 * cache.page_bytes
    assert cache.addresses[0] == first
    assert page is cache._held.arrays[0]
    changed = np.flatnonzero(page != before)
    assert 0 < len(changed) <= page.size / PAGE  # the page's last position, and nothing else


def test_chunks_equal_one_pass_over_many_pages(tiny: Callable[[int], Path]) -> None:
    with load(tiny(16), threads=2) as model:
        whole = model.logits(IDS)
        cache = model.new_cache(len(IDS))
        parts = np.split(IDS, [1, 255, 256, 257, 600, 999])
        pieces = np.concatenate([model.forward(part, cache, all_logits=True) for part in parts])
        assert np.abs(pieces - whole).max() < 1e-3
        assert np.array_equal(model.logits(IDS), whole)


def test_a_full_cache_is_refused_and_unchanged(model: Model) -> None:
    cache = model.new_cache(300)
    model.prefill(IDS[:200], cache)
    state = cache.length, cache.nbytes, cache.addresses.copy()
    for call in (model.forward, model.prefill):
        with pytest.raises(ContextLengthError, match=r"200 tokens in the cache and 101 more .* limit of 300"):
            call(IDS[:101], cache)
    assert (cache.length, cache.nbytes) == state[:2]
    assert np.array_equal(cache.addresses, state[2])
    model.prefill(IDS[200:300], cache)
    assert cache.length == 300
    with pytest.raises(ContextLengthError):
        model.forward(IDS[:1], cache)
    assert np.array_equal(
        model.prefill(IDS[:9], model.new_cache(9)), model.prefill(IDS[:9], model.new_cache())
    )


def test_the_context_is_a_limit(
    model: Model, tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.context == 2048
    with pytest.raises(ContextLengthError, match="a cache for 2049 tokens exceeds the model's context of 2048"):
        model.new_cache(2049)
    rooms: tuple[Any, ...] = (0, -1, 1.5, "9", True)
    for capacity in rooms:
        with pytest.raises(OptionError, match=f"capacity is {capacity!r}; it must be a whole number, 1 or more"):
            model.new_cache(capacity)
    monkeypatch.setattr("npqwen.engine.arrays.available_memory", lambda: 0)  # nothing is made room for first
    with pytest.raises(ContextLengthError):
        model.logits(np.zeros(2049, np.int64))
    monkeypatch.undo()
    with load(tiny(4), threads=1, context=64) as short:
        assert short.context == 64
        assert short.logits(IDS[:64]).shape == (64, 4128)
        with pytest.raises(ContextLengthError):
            short.logits(IDS[:65])
    impossible: tuple[Any, ...] = (0, -5, 64.0, "64", True)
    for context in impossible:
        with pytest.raises(OptionError, match=f"context is {context!r}; it must be a whole number, 1 or more"):
            load(tiny(4), context=context)
    with pytest.raises(OptionError, match="a context of 2,049 tokens is too large: this model supports at most 2,048"):
        load(tiny(4), context=2049)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([], "no tokens"),
        (np.zeros((0,), np.int32), "no tokens"),
        ([5, -1], "token id -1 is not in the vocabulary, 0 to 4127"),
        ([4128], "token id 4128"),
        (np.array([2**40]), "token id 1099511627776"),
        ([1.5], "whole numbers"),
        (np.array([1.0, 2.0]), "whole numbers"),
        (["a"], "whole numbers"),
        ("hello", "whole numbers"),
        ([[1, 2], [3, 4]], "one sequence"),
        (np.array([2**63], np.uint64), "token id 9223372036854775808"),
    ],
)
def test_wrong_ids_are_refused(model: Model, ids: Any, problem: str) -> None:
    cache = model.new_cache()
    calls: list[Callable[[], object]] = [
        lambda: model.forward(ids, cache),
        lambda: model.prefill(ids, cache),
        lambda: model.logits(ids),
    ]
    for call in calls:
        with pytest.raises(OptionError, match=problem):
            call()
    assert cache.length == 0


def test_ids_of_any_integer_type(model: Model) -> None:
    expected = model.logits([1, 2, 300])
    for ids in ((1, 2, 300), np.array([1, 2, 300], np.uint16), np.array([1, 0, 2, 0, 300, 0], np.int32)[::2]):
        assert np.array_equal(model.logits(ids), expected)
    assert expected.dtype == np.float32
    assert model.logits(7).shape == (1, 4128)


def test_another_models_cache_or_session_is_refused(model: Model, tmp_path: Path) -> None:
    """Kernels write to a cache's pages: those of another shape would be written out of bounds."""
    with load(small_model(tmp_path / "small"), threads=1) as other, load(model.path, threads=1) as same:
        for foreign in (other.new_cache(), same.new_cache(), same.new_cache().fork()):
            for call in (model.forward, model.prefill):
                with pytest.raises(OptionError, match="the cache belongs to another model"):
                    call(IDS[:3], foreign)
            assert (foreign.length, foreign.nbytes) == (0, 0)
        with pytest.raises(OptionError, match="the session belongs to another model"):
            model.chat("Hi", session=Session(other))


def test_a_models_own_caches_stay_its_own(model: Model, tmp_path: Path) -> None:
    session = Session(model)
    session.prefill(IDS[:20].tolist())
    session.save(tmp_path / "saved")
    expected = model.forward([5], session.cache.fork())
    for cache in (session.fork().cache, Session.load(model, tmp_path / "saved").cache, session.cache.fork(20)):
        assert np.array_equal(model.forward([5], cache), expected)


def test_wrong_arguments_are_refused_before_anything_is_computed(model: Model) -> None:
    cache = model.new_cache()
    read_only = np.zeros((1, 4128), np.float32)
    read_only.flags.writeable = False
    outs: tuple[Any, ...] = ("out", [1.0], np.zeros((1, 4127), np.float32), np.zeros((1, 4128)), read_only)
    for out in outs:
        with pytest.raises(OptionError, match=r"out must be a writable float32 array \(1, 4128\)"):
            model.forward([1], cache, out=out)
    others: tuple[Any, ...] = (None, "cache", [], object())
    for other in others:
        with pytest.raises(OptionError, match="the cache belongs to another model"):
            model.forward([1], other)
    progress: Any = 3
    with pytest.raises(OptionError, match="progress is 3; it must be a function"):
        model.prefill([1], cache, progress)
    assert cache.length == 0
    # Strides and alignment do not matter.
    expected = model.forward([1], model.new_cache())
    strided = np.zeros((1, 2 * 4128), np.float32)[:, ::2]
    unaligned = np.zeros(4 * 4128 + 1, np.uint8)[1:].view(np.float32).reshape(1, -1)
    for out in (strided, unaligned):
        assert model.forward([1], model.new_cache(), out=out) is out
        assert np.array_equal(out, expected)


def test_the_logits_of_the_lowest_ids_alone_are_those_of_all(model: Model) -> None:
    expected = model.forward([1], model.new_cache())
    for count in (16, 1024, 4112):
        whole = np.full((1, 4128), 7, np.float32)
        out = whole[:, :count]
        assert model.forward([1], model.new_cache(), out=out) is out
        assert np.array_equal(out, expected[:, :count])
        assert np.all(whole[:, count:] == 7)
