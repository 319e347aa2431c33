"""Attention kernels of this process's instruction set against NumPy references of a few lines."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from kernel_calls import run, together

from npqwen.kernels.attention import (
    MAX_ROWS,
    PAGE,
    attention,
    attention_kernels,
    page_items,
    scratch_floats,
    span_count,
    store_key,
    store_value,
)


class Cache:
    """Random pages of the cache as kernels/attention.py describes them, with stale positions past `length`."""

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
        assert whole.shape[1] == page_items(layers, kv_heads, dim)
        # Separate allocations, like the cache's pages.
        self.pages = [np.array(page) for page in whole]
        self.addresses = np.array([page.ctypes.data for page in self.pages])
        self.dtype_array = np.zeros(0, np.uint16 if dtype is np.float16 else np.float32)


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
            run(store_key, found.addresses, found.dtype_array, at, position, key)
            run(store_value, found.addresses, found.dtype_array, at + kv_heads, position, value)
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


def check_attention(
    dtype: Any, tokens: int, group: int, kv_heads: int, dim: int, start: int, members: int, size: float = 1.0
) -> None:
    layers, layer, heads = 2, 1, group * kv_heads
    cache = Cache(dtype, start + tokens, layers, kv_heads, dim, seed=start)
    rng = np.random.default_rng(tokens)
    q = np.zeros((tokens + 2, (heads + 2 * kv_heads) * dim), np.float32)
    q[:] = rng.standard_normal(q.shape) * size / np.sqrt(dim)
    out = np.full((tokens + 1, heads * dim), 7, np.float32)
    partials = np.full(8 * members * MAX_ROWS * (dim + 2), 9, np.float32)
    scratches = np.full((members, scratch_floats(dim)), 9, np.float32)
    kernels = attention_kernels(cache.dtype_array.dtype)
    together(
        members,
        attention,
        lambda member: (
            *(kernels, q, tokens, cache.addresses, cache.dtype_array, layer, heads, kv_heads, dim, start),
            *(partials, scratches[member], out),
        ),
    )
    expected = attended(q[:tokens, : heads * dim].reshape(tokens, heads, dim), cache, layer, start)
    assert np.abs(out[:tokens] - expected).max() < 1e-5 * max(1, size / 10)
    assert np.all(out[tokens:] == 7)


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


@DTYPES
@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize(("tokens", "group", "kv_heads"), [(1, 1, 1), (1, 2, 2), (1, 5, 1), (2, 3, 1), (3, 1, 2)])
def test_attention_split_over_positions(dtype: Any, members: int, tokens: int, group: int, kv_heads: int) -> None:
    start = 2300
    state = np.full(80, members, np.int64)
    assert run(span_count, state, tokens, group * kv_heads, kv_heads, start + tokens) > 1
    check_attention(dtype, tokens, group, kv_heads, 64, start, members)


@DTYPES
def test_attention_with_sharp_scores(dtype: Any) -> None:
    """Scores in the hundreds: one position gets all the weight, and nothing overflows."""
    check_attention(dtype, 5, 2, 2, 64, 300, 1, size=200.0)
