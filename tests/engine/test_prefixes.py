"""The pool of prefixes: what is found was computed, bytes are bounded, the least recently used is given up first."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
from prefix_pages import Ids, computed, content, marks, new_cache, run, text

from npqwen.engine.kv_cache import KVCache, held_bytes
from npqwen.engine.prefix_page import MIN_PREFIX
from npqwen.engine.prefixes import Prefixes
from npqwen.errors import ContextLengthError
from npqwen.kernels.cache_page import PAGE

BYTES = new_cache().page_bytes


def found(pool: Prefixes, ids: Ids) -> int:
    """How many of the tokens the pool has; what it has must be what was computed."""
    cache = new_cache()
    length = pool.extend(ids, cache)
    assert length == cache.length
    assert np.array_equal(content(cache), marks(ids[:length]))
    return length


def expected(shared: int) -> int:
    """What is found of a prefix: a few tokens on its last page are not worth it."""
    return shared if shared % PAGE >= MIN_PREFIX else shared // PAGE * PAGE


@pytest.mark.parametrize("shared", [16, 100, 255, 256, 257, 272, 300, 512, 699])
def test_the_tokens_that_two_texts_share_are_found(shared: int) -> None:
    pool = Prefixes(100 * BYTES)
    first = text(1, 700)
    pool.keep(first, computed(first))
    other = np.concatenate([first[:shared], first[shared : shared + 1] + 1, text(2, 50)])
    assert found(pool, other) == expected(shared)
    assert found(pool, first[:shared]) == expected(shared)
    assert found(pool, text(3, 700)) == 0


def test_texts_that_part_within_a_page_are_all_found() -> None:
    pool = Prefixes(100 * BYTES)
    first = text(1, 600)
    texts = [np.concatenate([first[: 256 + 60 * branch], text(10 + branch, 300)]) for branch in range(5)]
    for ids in texts:
        pool.keep(ids, computed(ids))
    for ids in texts:
        assert found(pool, np.concatenate([ids, text(99, 5)])) == expected(len(ids))
    assert found(pool, np.concatenate([first[:400], text(50, 300)])) == 400


def test_fewer_tokens_than_are_worth_it_are_not_given() -> None:
    pool = Prefixes(100 * BYTES)
    ids = text(1, 600)
    pool.keep(ids, computed(ids))
    assert found(pool, np.concatenate([ids[: MIN_PREFIX - 1], text(2, 100)])) == 0
    cache = computed(ids[:590])
    before = cache.addresses.copy()
    assert pool.extend(ids[:600], cache) == 590  # ten tokens are computed sooner
    assert np.array_equal(cache.addresses, before)


def test_pages_are_shared_and_a_text_may_continue_in_place() -> None:
    pool = Prefixes(100 * BYTES)
    ids = text(1, 600)
    cache = computed(ids[:550])
    pool.keep(ids[:550], cache)
    before = cache.addresses.copy()
    assert held_bytes([cache], pool.arrays) == 3 * BYTES
    run(cache, ids[550:])  # behind the pool's tokens: no copy
    assert np.array_equal(cache.addresses, before)
    assert found(pool, ids) == 550
    other = new_cache()
    pool.extend(ids, other)
    run(other, text(5, 20))
    assert other.addresses[:2].tolist() == cache.addresses[:2].tolist()
    assert other.addresses[2] != cache.addresses[2]
    assert found(pool, ids) == 550
    assert np.array_equal(content(cache), marks(ids))


def test_a_cache_that_is_cut_and_written_again_does_not_change_the_pool() -> None:
    pool = Prefixes(100 * BYTES)
    ids = text(1, 600)
    cache = computed(ids)
    pool.keep(ids, cache)
    for cut in (590, 530, 512, 300, 0):
        cache.truncate(cut)
        run(cache, text(cut, 600 - cut))
        assert found(pool, np.concatenate([ids, ids])) == 600


def test_a_longer_text_takes_the_place_of_the_one_it_continues() -> None:
    pool = Prefixes(100 * BYTES)
    ids = text(1, 1000)
    cache = new_cache()
    for start in range(0, 1000, 50):
        run(cache, ids[start : start + 50])
        pool.keep(ids[: start + 50], cache)
    assert pool.nbytes == 4 * BYTES
    pool.keep(ids[:800], computed(ids[:800]))  # nothing new
    assert pool.nbytes == 4 * BYTES
    assert held_bytes([cache], pool.arrays) == 4 * BYTES


def test_the_least_recently_used_end_is_given_up_first_and_the_bytes_are_bounded() -> None:
    pool = Prefixes(6 * BYTES)
    a, b, c = text(1, 2 * PAGE), text(2, 2 * PAGE), text(3, 2 * PAGE)
    for ids in (a, b, c):
        pool.keep(ids, computed(ids))
    more = np.zeros(1, np.int32)
    assert found(pool, np.concatenate([a, more])) == 2 * PAGE  # so b is the least recently used
    d = text(4, PAGE)
    pool.keep(d, computed(d))
    assert pool.nbytes == 6 * BYTES
    assert [len(pool.find(np.concatenate([ids, more])).pages) for ids in (b, a, c, d)] == [1, 2, 2, 1]
    assert pool.evict_oldest()
    assert [len(pool.find(np.concatenate([ids, more])).pages) for ids in (b, a, c, d)] == [0, 2, 2, 1]
    pool.set_limit(0)
    assert pool.nbytes == 5 * BYTES  # given by the user
    while pool.evict_oldest():
        pass
    assert (pool.nbytes, pool.arrays) == (0, [])


def test_of_a_text_that_does_not_fit_the_beginning_is_kept() -> None:
    pool = Prefixes(3 * BYTES, adjustable=True)
    ids = text(1, 8 * PAGE)
    pool.keep(ids, computed(ids))
    assert found(pool, ids) == 3 * PAGE
    pool.set_limit(BYTES)
    assert found(pool, ids) == PAGE
    pool.set_limit(0)
    pool.keep(ids, computed(ids))
    assert found(pool, ids) == 0


def test_a_prefix_longer_than_a_cache_may_hold_is_refused_before_it_changes() -> None:
    pool = Prefixes(100 * BYTES)
    ids = text(1, 600)
    pool.keep(ids, computed(ids))
    small = computed(ids[:20], limit=400)
    with pytest.raises(ContextLengthError):
        pool.find(ids).load_into(small)
    assert small.length == 20


@pytest.mark.parametrize("seed", range(10))
def test_any_texts_in_any_order_are_found_as_they_were_computed(seed: int) -> None:
    """A tree of texts, caches that live on, forks, cuts, and a pool that is too small for all of it."""
    rng = random.Random(seed)
    pool = Prefixes(rng.choice([2, 5, 9, 40]) * BYTES, adjustable=True)
    live: list[tuple[KVCache, Ids]] = []
    for step in range(60):
        if live and rng.random() < 0.6:
            base = rng.choice(live)[1]
            ids = np.concatenate([base[: rng.randrange(len(base) + 1)], text(rng.randrange(5), rng.randrange(1, 400))])
        else:
            ids = text(rng.randrange(5), rng.randrange(1, 900))
        ids = ids[: 5 * PAGE]
        cache = new_cache()
        length = pool.extend(ids[:-1], cache)
        assert length < len(ids)
        run(cache, ids[length:])
        assert np.array_equal(content(cache), marks(ids))
        pool.keep(ids[: rng.randrange(len(ids) + 1)], cache)
        live.append((cache, ids))
        if rng.random() < 0.5:
            cache, ids = live.pop(rng.randrange(len(live)))
            cut = rng.randrange(len(ids) + 1)
            cache.truncate(cut)
            run(cache, text(step, 30))
            ids = np.concatenate([ids[:cut], text(step, 30)])
            pool.keep(ids, cache)
            live.append((cache, ids))
        assert pool.nbytes <= pool._limit
        for cache, ids in live[-5:]:
            assert np.array_equal(content(cache), marks(ids))
        live = live[-8:]


def test_many_threads_use_one_pool() -> None:
    pool = Prefixes(8 * BYTES)
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(40):
                ids = np.concatenate([text(1, rng.randrange(1, 600)), text(rng.randrange(9), 80)])
                cache = new_cache()
                length = pool.extend(ids[:-1], cache)
                run(cache, ids[length:])
                assert np.array_equal(content(cache), marks(ids))
                pool.keep(ids, cache)
                if rng.random() < 0.1:
                    pool.evict_oldest()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert pool.nbytes <= 8 * BYTES
