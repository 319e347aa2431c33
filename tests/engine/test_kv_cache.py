"""Caches: forks that share pages and never change each other, and misuse that is refused."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_config

from npqwen.engine.kv_cache import KVCache
from npqwen.errors import OptionError, OutOfMemoryError
from npqwen.format.config import Config
from npqwen.kernels.cache_page import PAGE
from npqwen.model import Model, load

IDS = np.random.default_rng(5).integers(0, 4096, 2000)


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with load(tiny(4), threads=2) as loaded:
        yield loaded


SMALL = Config.from_dict(make_config(num_hidden_layers=1, num_key_value_heads=1, head_dim=16))


def positions(cache: KVCache) -> np.ndarray:
    """The first coordinate of the value at each position."""
    pages = cache.pages(cache.length)
    if not pages:
        return np.zeros(0, np.float32)
    return np.concatenate([page[0, 1, 0].reshape(-1, 16)[:, 0] for page in pages])[: cache.length]


def append(cache: KVCache, marks: list[int]) -> None:
    """Do what a forward pass does: reserve, write at the addresses, advance."""
    cache.reserve(len(marks))
    for mark in marks:
        memory = ctypes.c_float * (cache.page_bytes // 4)
        page = np.ctypeslib.as_array(memory.from_address(int(cache.addresses[cache.length // PAGE])))
        page = page.reshape(cache.page_shape)
        page[0, 1, 0].reshape(-1, 16)[cache.length % PAGE] = mark
        page[0, 0, 0].reshape(-1, 16, 16)[cache.length % PAGE // 16, :, cache.length % 16] = mark
        cache.length += 1


@pytest.mark.parametrize("seed", range(20))
def test_any_family_of_forks_is_as_good_as_copies(seed: int) -> None:
    """Append, truncate, fork and drop at random; each cache must hold what was appended to it, and only that."""
    rng = random.Random(seed)
    family: list[tuple[KVCache, list[int]]] = [(KVCache(SMALL, 5 * PAGE, "f32"), [])]
    for step in range(300):
        chosen = rng.randrange(len(family))
        cache, held = family[chosen]
        move = rng.random()
        if move < 0.45:
            marks = [step] * rng.choice([1, 1, 7, 100, 256, 300])
            if len(held) + len(marks) <= cache.limit:
                append(cache, marks)
                held += marks
        elif move < 0.7:
            border = rng.choice([len(held), len(held) // PAGE * PAGE, rng.randrange(len(held) + 1)])
            cache.truncate(border)
            del held[border:]
        elif move < 0.9 and len(family) < 6:
            length = rng.choice([None, len(held), rng.randrange(len(held) + 1)])
            family.append((cache.fork(length), held[:length] if length is not None else held.copy()))
        elif len(family) > 1:
            del family[chosen], cache
        for cache, held in family:
            assert cache.length == len(held)
            assert np.array_equal(positions(cache), np.array(held, np.float32))


def test_full_pages_are_shared_and_the_last_is_copied(model: Model) -> None:
    cache = model.new_cache()
    model.prefill(IDS[: 2 * PAGE + 9], cache)
    before = cache.addresses.copy()
    fork = cache.fork()
    assert fork.length == cache.length
    assert np.array_equal(cache.addresses, before)
    assert (fork.addresses[:3] == cache.addresses[:3]).tolist() == [True, True, False]
    expected = model.forward([5], model_cache(model, IDS[: 2 * PAGE + 9]))
    assert np.array_equal(model.forward([5], fork), expected)
    assert np.array_equal(model.forward([5], cache), expected)
    assert np.array_equal(cache.addresses, before)  # the original never moved
    exact = cache.fork(PAGE)
    assert exact.addresses[0] == cache.addresses[0]
    assert exact.nbytes == exact.page_bytes
    assert cache.fork(0).nbytes == 0


def model_cache(model: Model, ids: np.ndarray) -> KVCache:
    cache = model.new_cache()
    model.prefill(ids, cache)
    return cache


def test_a_shared_page_that_is_cut_and_written_again_is_copied_first(model: Model) -> None:
    cache = model_cache(model, IDS[:600])
    fork = cache.fork()
    rows = model.forward([7], cache.fork())
    fork.truncate(100)
    other = model.prefill(IDS[1000:1400], fork)
    assert np.array_equal(model.forward([7], cache.fork()), rows)
    fresh = model_cache(model, IDS[:100])
    assert np.array_equal(model.prefill(IDS[1000:1400], fresh), other)
    # And the other way round.
    cache.truncate(10)
    model.prefill(IDS[700:1300], cache)
    fork.truncate(100)
    assert np.array_equal(model.prefill(IDS[1000:1400], fork), other)


def test_a_fork_outlives_the_original(model: Model) -> None:
    cache = model_cache(model, IDS[:300])
    fork = cache.fork(290)
    del cache
    expected = model.forward([3], model_cache(model, IDS[:290]))
    assert np.array_equal(model.forward([3], fork), expected)


def test_the_copy_of_a_shared_page_counts_as_memory(model: Model) -> None:
    cache = model_cache(model, IDS[:300])
    cache.share(300)
    cache.truncate(290)  # its positions up to 300 belong to others
    assert cache.missing_bytes(5) == cache.page_bytes
    before = {array.ctypes.data for array in cache.held_arrays}
    cache.reserve(5)
    assert len({array.ctypes.data for array in cache.held_arrays} - before) == 1
    assert cache.missing_bytes(5) == 0
    assert cache.missing_bytes(300) == cache.page_bytes


def test_impossible_forks(model: Model) -> None:
    cache = model_cache(model, IDS[:10])
    with pytest.raises(OptionError, match="length is 11; the cache has 10 tokens"):
        cache.fork(11)
    impossible: tuple[Any, ...] = (-1, 2.0, "3", True, [4])
    for length in impossible:
        for call in (cache.fork, cache.truncate, cache.reserve, cache.reusable):
            with pytest.raises(OptionError, match=r"is .*; it must be a whole number, 0 or more"):
                call(length)
    of_numpy: Any = np.int64(3)
    assert (cache.length, cache.fork(of_numpy).length) == (10, 3)


def test_any_prefix_can_be_reused(model: Model) -> None:
    cache = model_cache(model, IDS[:10])
    assert [cache.reusable(length) for length in (0, 7, 10, 99)] == [0, 7, 10, 10]


def test_a_second_thread_is_refused(model: Model) -> None:
    """A page that another thread removes, or has not allocated yet, would crash the process during a pass."""
    cache = model_cache(model, IDS[:10])
    refused: list[Exception] = []

    def use() -> None:
        for call in (
            lambda: model.forward([1], cache),
            lambda: model.prefill([1], cache),
            cache.fork,
            lambda: cache.truncate(3),
            lambda: cache.reserve(300),
        ):
            try:
                call()
            except OptionError as error:
                refused.append(error)

    def progress(done: int, total: int) -> None:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        cache.in_use.__enter__()  # its own thread may
        cache.in_use.__exit__()

    model.prefill(IDS[10:20], cache, progress)
    assert [str(error) for error in refused] == [
        "another thread is using this cache; give each thread its own, such as a fork"
    ] * 5
    assert np.array_equal(model.forward([5], cache), model.forward([5], model_cache(model, IDS[:20])))


def test_many_threads_with_one_cache_do_no_harm(model: Model) -> None:
    cache = model.new_cache()
    done = [0] * 4

    def run(i: int) -> None:
        for _ in range(100):
            try:
                model.forward([1, 2, 3], cache)
                done[i] += 3
            except OptionError:
                pass
            if i == 3:
                with contextlib.suppress(OptionError):
                    cache.fork()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.length == sum(done) > 0


def test_a_page_is_zeros_that_the_kernels_can_load_and_is_gone_with_its_cache() -> None:
    cache = KVCache(SMALL, PAGE, "f32")
    cache.reserve(1)
    page = cache.pages(PAGE)[0]
    assert not page.any()
    assert page.ctypes.data % 64 == 0
    assert page.flags.writeable
    owner = weakref.ref(_owner(page))
    del cache, page
    assert owner() is None


def _owner(array: np.ndarray) -> Any:
    """The object whose memory an array shows."""
    owner: Any = array
    while getattr(owner, "base", None) is not None:
        owner = owner.base
    return owner.obj if isinstance(owner, memoryview) else owner


def test_a_page_that_the_system_refuses_is_out_of_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    cache = model.new_cache()
    monkeypatch.setattr("npqwen.kernels.paging.mmap.mmap", refuse)
    with pytest.raises(OutOfMemoryError, match="shorten the prompt"):
        cache.reserve(1)
    assert cache.page_count == 0


def test_a_fork_that_memory_cannot_hold_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model_cache(model, IDS[: PAGE + 10])
    full = cache.fork(PAGE)
    monkeypatch.setattr("npqwen.engine.kv_cache.available_memory", lambda: 0)
    assert cache.fork(PAGE).length == PAGE  # needs none
    with pytest.raises(OutOfMemoryError):
        cache.fork()
    full.truncate(5)
    with pytest.raises(OutOfMemoryError):  # a copy of a page that it shares
        model.forward([1], full)
    assert full.length == 5
    monkeypatch.undo()
    expected = model.forward([1], model_cache(model, IDS[:5]))
    assert np.array_equal(model.forward([1], full), expected)
