"""Which tokens run in which pass: full passes, nothing twice, nobody waits for those who came later, memory is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import npqwen
from npqwen.engine.piece import Piece
from npqwen.errors import OutOfMemoryError
from npqwen.retrieval.reader import Reader

Loaded = Callable[[int], npqwen.Model]
rng = np.random.default_rng(5)


@pytest.fixture
def model(embedder: Loaded) -> Iterator[npqwen.Model]:
    model = embedder(4)
    model.prefixes.clear()
    yield model
    model.prefixes.clear()


@pytest.fixture
def passes(model: npqwen.Model) -> Iterator[list[list[int]]]:
    """The tokens of each piece, pass by pass."""
    seen: list[list[int]] = []
    run = model.hidden_pieces

    def noted(pieces: Any) -> Any:
        seen.append([len(piece.ids) for piece in pieces])
        return run(pieces)

    with mock.patch.object(model, "hidden_pieces", noted):
        yield seen


def texts(*lengths: int, common: int = 0) -> list[np.ndarray]:
    """Random texts, which have `common` tokens in common at their beginning, and no more."""
    start = rng.integers(0, 4096, common)
    found = []
    for at, length in enumerate(lengths):
        ids = np.concatenate([start, rng.integers(0, 4096, length - common)]).astype(np.int32)
        ids[common] = at
        found.append(ids)
    return found


def alone(model: npqwen.Model, ids: np.ndarray) -> np.ndarray:
    state: np.ndarray = model.hidden(ids)[-1]
    return state


def test_passes_are_full_whatever_the_lengths(model: npqwen.Model, passes: list[list[int]]) -> None:
    given = texts(100, 300, 7, 1, 400, 60)
    states = Reader(model).read(given)
    assert [sum(sizes) for sizes in passes] == [256, 256, 256, 100]
    assert passes[0] == [100, 156]
    for ids, state in zip(given, states, strict=True):
        np.testing.assert_array_equal(state, alone(model, ids))


def test_what_texts_begin_with_is_computed_once(model: npqwen.Model, passes: list[list[int]]) -> None:
    given = texts(*[130] * 9, common=100)
    reader = Reader(model)
    states = reader.read(given)
    assert sum(map(sum, passes)) == 130 + 8 * 30
    assert reader.statistics.cached_tokens == 8 * 100
    passes.clear()
    again = texts(130, 131, common=100)
    for ids in again:
        ids[:100] = given[0][:100]
    Reader(model).read(again)  # another caller's texts, by the pool of prefixes
    assert sum(map(sum, passes)) == 30 + 31
    for ids, state in zip(given, states, strict=True):
        np.testing.assert_array_equal(state, alone(model, ids))


def test_texts_that_are_equal_or_parts_of_each_other(model: npqwen.Model) -> None:
    long = texts(300)[0]
    given = [long, long, long[:280], long[:20], long]
    for chosen in (given, given[::-1], [long, long]):
        for ids, state in zip(chosen, Reader(model).read(chosen), strict=True):
            np.testing.assert_array_equal(state, alone(model, ids))


def test_a_query_does_not_wait_for_all_of_an_earlier_request(
    model: npqwen.Model, passes: list[list[int]]
) -> None:
    reader = Reader(model)
    ended: list[str] = []
    reader.add(texts(*[200] * 20), lambda error: ended.append("many"))
    reader.step()
    reader.add(texts(16), lambda error: ended.append("query"))
    reader.step()
    assert ended == ["query"]
    while reader.step():
        pass
    assert ended == ["query", "many"]
    assert all(sum(sizes) == 256 for sizes in passes[:-1])


def test_a_long_text_does_not_starve(model: npqwen.Model) -> None:
    reader = Reader(model)
    ended: list[int] = []
    reader.add(texts(500), lambda error: ended.append(-1))
    for at in range(50):
        reader.add(texts(250), lambda error, at=at: ended.append(at))  # type: ignore[misc]
        reader.step()
        if -1 in ended:
            break
    assert -1 in ended
    assert len(ended) < 20
    reader.fail(RuntimeError())


def test_memory_is_a_limit(model: npqwen.Model) -> None:
    page = model.new_cache(1).page_bytes
    given = texts(*[300] * 6, 20, 500)
    reader = Reader(model, memory=3 * page)
    most = 0
    run = model.hidden_pieces

    def noted(pieces: list[Piece]) -> Any:
        nonlocal most
        most = max(most, reader.cache_bytes)
        return run(pieces)

    with mock.patch.object(model, "hidden_pieces", noted):
        states = reader.read(given)
    assert 2 * page <= most <= 3 * page
    for ids, state in zip(given, states, strict=True):
        np.testing.assert_array_equal(state, alone(model, ids))
    with pytest.raises(OutOfMemoryError, match=r"a text of 300 tokens does not fit into .* of memory .*; shorten it"):
        Reader(model, memory=page).read(given)


def test_common_tokens_survive_a_lack_of_memory(model: npqwen.Model) -> None:
    page = model.new_cache(1).page_bytes
    given = texts(*[500, 30, 480, 40, 300], common=20)
    states = Reader(model, memory=2 * page).read(given)
    for ids, state in zip(given, states, strict=True):
        np.testing.assert_array_equal(state, alone(model, ids))


def test_one_caller_s_lack_of_memory_is_not_another_s(model: npqwen.Model) -> None:
    page = model.new_cache(1).page_bytes
    reader = Reader(model, memory=page)
    ends: dict[str, BaseException | None] = {}
    reader.add(texts(500), lambda error: ends.update(long=error))
    reader.add(texts(50), lambda error: ends.update(short=error))
    while reader.step():
        pass
    assert isinstance(ends["long"], OutOfMemoryError)
    assert ends["short"] is None


def test_who_leaves_gives_back_the_memory(model: npqwen.Model) -> None:
    reader = Reader(model)
    ends: list[BaseException | None] = []
    readings = reader.add(texts(*[400] * 5), ends.append)
    assert (reader.waiting, reader.running) == (1, 0)
    assert reader.step()
    assert (reader.waiting, reader.running) == (0, 1)
    assert reader.cache_bytes
    reader.cancel(readings)
    assert not reader.step()
    assert (ends, reader.cache_bytes) == ([None], 0)


def test_an_error_of_the_model_is_everybody_s(model: npqwen.Model) -> None:
    reader = Reader(model)
    ends: list[BaseException | None] = []
    reader.add(texts(10), ends.append)
    reader.add(texts(20), ends.append)
    problem = RuntimeError("x")
    with mock.patch.object(model, "hidden_pieces", side_effect=problem), pytest.raises(RuntimeError):
        reader.step()
    assert ends == []
    reader.fail(problem)
    assert ends == [problem, problem]
    assert not reader.step()


def test_an_interrupt_leaves_nothing(model: npqwen.Model) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.embed(["a", "b"], progress=stop)
    np.testing.assert_array_equal(model.embed("a"), model.embed(["b", "a"])[1])


def test_few_texts_have_caches_at_once(model: npqwen.Model, passes: list[list[int]]) -> None:
    given = texts(*[4] * 40)
    states = Reader(model, parallel=5).read(given)
    assert {len(sizes) for sizes in passes} == {5}
    np.testing.assert_array_equal(states[39], alone(model, given[39]))


def test_random_texts_together_are_those_alone(model: npqwen.Model) -> None:
    random = np.random.default_rng(11)
    for _ in range(6):
        common = int(random.choice([0, 5, 40, 260]))
        lengths = [common + 1 + int(n) for n in random.geometric(0.02, random.integers(1, 20)).clip(1, 240)]
        given = texts(*lengths, common=common)
        page = model.new_cache(1).page_bytes
        memory = None if random.random() < 0.5 else 4 * page
        reader = Reader(model, parallel=int(random.integers(1, 9)), memory=memory)
        for ids, state in zip(given, reader.read(given), strict=True):
            np.testing.assert_array_equal(state, alone(model, ids))


@pytest.mark.parametrize("common", [5, 40, 100, 300, 700])
def test_texts_of_a_hybrid_branch_off_at_a_checkpoint(hybrid: Callable[[str, int], Path], common: int) -> None:
    with npqwen.load(hybrid("qwen35", 8), threads=1) as model:
        given = texts(common + 30, common + 1, common + 200, common + 9, common=common)
        given = [ids % model.config.vocab_size for ids in given]
        reader = Reader(model)
        for ids, state in zip(given, reader.read(given), strict=True):
            np.testing.assert_allclose(state, alone(model, ids), atol=1e-5)
        assert (reader.statistics.cached_tokens > 0) == (common >= 40)
