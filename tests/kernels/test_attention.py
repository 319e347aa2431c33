"""Attention kernels of this process's instruction set against NumPy references of a few lines."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from kernel_calls import call_at, run, together

from npqwen.kernels.append import APPEND_KEY, APPEND_VALUE, append_kernels
from npqwen.kernels.attention import (
    MAX_ROWS,
    SEQUENCE,
    attention,
    attention_kernels,
    is_divided,
    scratch_floats,
)
from npqwen.kernels.cache_page import PAGE


class Cache:
    """Random pages of the cache as kernels/cache_page.py describes them, with stale positions past `length`."""

    def __init__(self, dtype: Any, length: int, layers: int, kv_heads: int, dim: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        pages = -(-length // PAGE)
        shape = pages * PAGE, layers, kv_heads, dim
        self.keys = rng.standard_normal(shape).astype(dtype)
        self.values = rng.standard_normal(shape).astype(dtype)
        self.keys[length:] *= dtype(100)
        self.values[length:] *= dtype(100)
        keys = self.keys.reshape(pages, PAGE // 16, 16, layers, kv_heads, dim).transpose(0, 3, 4, 1, 5, 2)
        values = self.values.reshape(pages, PAGE, layers, kv_heads, dim).transpose(0, 2, 3, 1, 4)
        flat = [part.reshape(pages, layers, 1, kv_heads, -1) for part in (keys, values)]
        whole = np.ascontiguousarray(np.concatenate(flat, axis=2)).reshape(pages, -1)
        assert whole.shape[1] == layers * 2 * kv_heads * PAGE * dim
        # Separate allocations, like the cache's pages.
        self.pages = [np.array(page) for page in whole]
        self.addresses = np.array([page.ctypes.data for page in self.pages])
        self.dtype = np.dtype(np.uint16 if dtype is np.float16 else np.float32)


def append(cache: Any, kernel: int, index: int, position: int, x: np.ndarray) -> None:
    """Write a key or value, float32 (dim,), at a head's index of a page."""
    call_at(append_kernels(cache.dtype)[kernel], cache.addresses.ctypes.data, index, position, x.ctypes.data, x.size)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dim", [16, 128])
def test_store_key_and_value(dtype: Any, dim: int) -> None:
    layers, kv_heads, length = 2, 3, PAGE + 20
    expected = Cache(dtype, length, layers, kv_heads, dim)
    found = Cache(dtype, length, layers, kv_heads, dim)
    for page in found.pages:
        page[:] = 0
    which = list(itertools.product(range(layers), range(kv_heads)))
    for position in range(2 * PAGE):
        for layer, head in which:
            key = expected.keys[position, layer, head].astype(np.float32)
            value = expected.values[position, layer, head].astype(np.float32)
            at = 2 * layer * kv_heads + head
            append(found, APPEND_KEY, at, position, key)
            append(found, APPEND_VALUE, at + kv_heads, position, value)
    for mine, theirs in zip(found.pages, expected.pages, strict=True):
        assert np.array_equal(mine, theirs)


def attended(q: np.ndarray, cache: Cache, layer: int, start: int) -> np.ndarray:
    """softmax(q @ keys.T) @ values of every token and head in float64: q (tokens, heads, dim)."""
    tokens, heads, dim = q.shape
    end = start + tokens
    group = heads // cache.keys.shape[2]
    keys, values = (
        np.repeat(part[:end, layer], group, axis=1).astype(np.float64) for part in (cache.keys, cache.values)
    )
    scores = np.einsum("thd,phd->htp", q, keys)
    scores[:, np.arange(end) > start + np.arange(tokens)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(2, keepdims=True))
    out = np.einsum("htp,phd->thd", weights / weights.sum(2, keepdims=True), values)
    return np.asarray(out.reshape(tokens, heads * dim))


class Part:
    """What a pass runs of one sequence: its cache, and the position of the first of `tokens`."""

    def __init__(self, dtype: Any, tokens: int, start: int, kv_heads: int, dim: int) -> None:
        self.tokens, self.start = tokens, start
        self.cache = Cache(dtype, start + tokens, 2, kv_heads, dim, seed=start)


def attend(
    parts: list[Part], q: np.ndarray, heads: int, kv_heads: int, members: int, spans: int = 4
) -> np.ndarray[Any, Any]:
    """attention() over the parts, of layer 1; q: (tokens, heads, dim). spans: for how many there is room, each."""
    tokens, _, dim = q.shape
    rows = np.full((tokens + 2, (heads + 2 * kv_heads) * dim), 9, np.float32)
    rows[:tokens, : heads * dim] = q.reshape(tokens, -1)
    out = np.full((tokens + 1, heads * dim), 7, np.float32)
    partials = np.full(spans * tokens * kv_heads * MAX_ROWS * (dim + 2), 9, np.float32)
    scratches = np.full((members, scratch_floats(dim)), 9, np.float32)
    records, first = np.zeros(len(parts), SEQUENCE), 0
    for record, part in zip(records, parts, strict=True):
        addresses = part.cache.addresses.ctypes.data
        record["first"], record["tokens"], record["start"], record["pages"] = first, part.tokens, part.start, addresses
        first += part.tokens
    dtype = parts[0].cache.dtype
    kernels = attention_kernels(dtype)
    together(
        members,
        attention,
        lambda member: (
            *(kernels, rows, records, dtype == np.uint8, 1, heads, kv_heads, dim),
            *(partials, scratches[member], out),
        ),
    )
    assert np.all(out[tokens:] == 7)
    return np.array(out[:tokens])


def queries(tokens: int, heads: int, dim: int, size: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(tokens)
    return np.asarray(rng.standard_normal((tokens, heads, dim)) * size / np.sqrt(dim), np.float32)


def check_attention(
    dtype: Any, tokens: int, group: int, kv_heads: int, dim: int, start: int, members: int, size: float = 1.0
) -> None:
    q = queries(tokens, group * kv_heads, dim, size)
    part = Part(dtype, tokens, start, kv_heads, dim)
    out = attend([part], q, group * kv_heads, kv_heads, members)
    assert np.abs(out - attended(q, part.cache, 1, start)).max() < 1e-5 * max(1, size / 10)


DTYPES = pytest.mark.parametrize("dtype", [np.float16, np.float32])


@DTYPES
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 17, 33])
def test_attention_of_tokens_and_groups(dtype: Any, tokens: int, group: int) -> None:
    check_attention(dtype, tokens, group, 2, 16, 0, 1)
    check_attention(dtype, tokens, group, 1, 32, 77, 2)


@DTYPES
@pytest.mark.parametrize("dim", [16, 48, 64, 128])
@pytest.mark.parametrize("start", [0, 15, 63, 64, 250, 256, 511, 700])
def test_attention_across_blocks_and_pages(dtype: Any, dim: int, start: int) -> None:
    for tokens in (1, 9):
        check_attention(dtype, tokens, 2, 2, dim, start, 1)


def divides(members: int, parts: list[Part], group: int, kv_heads: int, dim: int, room: int = 1 << 30) -> bool:
    records = np.zeros(len(parts), SEQUENCE)
    records["tokens"] = [part.tokens for part in parts]
    records["start"] = [part.start for part in parts]
    return bool(run(is_divided, np.full(80, members, np.int64), records, group, kv_heads, dim, room))


@DTYPES
@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize(("tokens", "group", "kv_heads"), [(1, 1, 1), (1, 2, 2), (1, 5, 1), (2, 3, 1), (3, 1, 2)])
def test_spans_shared_by_threads_are_merged_as_by_one(
    dtype: Any, members: int, tokens: int, group: int, kv_heads: int
) -> None:
    part = Part(dtype, tokens, 2300, kv_heads, 64)
    assert divides(members, [part], group, kv_heads, 64)
    check_attention(dtype, tokens, group, kv_heads, 64, 2300, members)
    q = queries(tokens, group * kv_heads, 64)
    alone = attend([part], q, group * kv_heads, kv_heads, 1)
    assert np.array_equal(attend([part], q, group * kv_heads, kv_heads, members), alone)
    without_room = attend([part], q, group * kv_heads, kv_heads, members, spans=0)
    assert np.array_equal(without_room, alone)


def test_spans_are_tasks_only_where_threads_lack_work_and_there_is_room() -> None:
    part = Part(np.float16, 1, 2300, 2, 16)
    assert divides(2, [part], 2, 2, 16)
    assert divides(2, [part], 2, 2, 16, room=2 * 3 * 2 * 18)
    assert not divides(2, [part], 2, 2, 16, room=2 * 3 * 2 * 18 - 1)
    assert not divides(1, [part], 2, 2, 16)
    assert not divides(2, 4 * [part], 2, 2, 16)


@DTYPES
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(("group", "kv_heads"), [(1, 1), (2, 2), (8, 1)])
def test_a_sequence_in_company_is_the_sequence_alone_to_the_bit(
    dtype: Any, members: int, group: int, kv_heads: int
) -> None:
    dim, heads = 32, group * kv_heads
    parts = [
        Part(dtype, tokens, start, kv_heads, dim)
        for tokens, start in [(1, 0), (1, 1100), (33, 1020), (1, 2047), (5, 64), (2, 1023)]
    ]
    q = queries(sum(part.tokens for part in parts), heads, dim)
    together_ = attend(parts, q, heads, kv_heads, members)
    first = 0
    for part in parts:
        mine = slice(first, first + part.tokens)
        assert np.array_equal(together_[mine], attend([part], q[mine], heads, kv_heads, 1))
        assert np.abs(together_[mine] - attended(q[mine], part.cache, 1, part.start)).max() < 1e-5
        for t in range(part.tokens):  # and each token is what it is in a pass of its own
            alone = Part(dtype, 1, part.start + t, kv_heads, dim)
            alone.cache = part.cache
            row = attend([alone], q[first + t : first + t + 1], heads, kv_heads, 1)
            assert np.array_equal(row[0], together_[first + t])
        first += part.tokens


@DTYPES
def test_attention_with_sharp_scores(dtype: Any) -> None:
    """Scores in the hundreds: one position gets all the weight, and nothing overflows."""
    check_attention(dtype, 5, 2, 2, 64, 300, 1, size=200.0)
