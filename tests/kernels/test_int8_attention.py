"""Attention over int8 keys and values against NumPy: the stored integers exactly, results within their rounding."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from kernel_calls import run
from test_attention import Part, append, attend, attended, queries

from npqwen.kernels.append import APPEND_KEY, APPEND_VALUE
from npqwen.kernels.cache_page import PAGE
from npqwen.kernels.int8_page import int8_tile_bytes, rotate_coordinates


def hadamard(size: int) -> np.ndarray:
    """The normalized Walsh-Hadamard matrix, by Sylvester's construction."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size))


def rotated(x: np.ndarray) -> np.ndarray:
    size = x.shape[-1] & -x.shape[-1]
    return np.asarray(x.reshape(*x.shape[:-1], -1, size) @ hadamard(size)).reshape(x.shape)


class Int8Cache:
    """A cache of random keys and values, written by the kernels; positions past `length` hold large stale ones."""

    def __init__(self, length: int, layers: int, kv_heads: int, dim: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        pages = -(-length // PAGE)
        shape = pages * PAGE, layers, kv_heads, dim
        self.keys = rng.standard_normal(shape).astype(np.float32)
        self.values = rng.standard_normal(shape).astype(np.float32)
        self.keys[length:] *= 100
        self.values[length:] *= 100
        size = layers * 2 * kv_heads * (PAGE // 32) * int8_tile_bytes(dim)
        self.pages = [np.zeros(size, np.uint8) for _ in range(pages)]
        self.addresses = np.array([page.ctypes.data for page in self.pages])
        self.dtype = np.dtype(np.uint8)
        for position, layer, head in itertools.product(range(pages * PAGE), range(layers), range(kv_heads)):
            at = 2 * layer * kv_heads + head
            key, value = self.keys[position, layer, head], self.values[position, layer, head]
            append(self, APPEND_KEY, at, position, key.copy())
            append(self, APPEND_VALUE, at + kv_heads, position, value)


def stored(cache: Int8Cache, dim: int, layers: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values that the pages hold, float32 (positions, layers, heads, dim), read as int8_page.py says."""
    padded = -(-dim // 32) * 32
    found = []
    for page in cache.pages:
        tiles = page.reshape(layers, 2, kv_heads, PAGE // 32, -1)
        scales = tiles[..., :128].copy().view(np.float32)
        blocks = tiles[..., 128:].view(np.int8)
        keys = blocks[:, 0].reshape(layers, kv_heads, PAGE // 32, 2, padded // 4, 16, 4)
        keys = keys.transpose(2, 3, 5, 0, 1, 4, 6).reshape(PAGE, layers, kv_heads, padded)
        values = blocks[:, 1].reshape(layers, kv_heads, PAGE // 32, padded // 16, 8, 16, 4)
        values = values.transpose(2, 4, 6, 0, 1, 3, 5).reshape(PAGE, layers, kv_heads, padded)
        by_position = scales.transpose(3, 4, 1, 0, 2).reshape(PAGE, 2, layers, kv_heads)
        assert not keys[..., dim:].any()
        assert not values[..., dim:].any()
        found.append((keys[..., :dim] * by_position[:, 0, ..., None], values[..., :dim] * by_position[:, 1, ..., None]))
    keys, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return keys, values


def nearest(x: np.ndarray) -> np.ndarray:
    """x rounded to int8 with a scale for each vector, in the float32 arithmetic of the kernels."""
    scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
    inverse = np.float32(1) / scale
    return np.asarray(np.rint(x * inverse) * scale)


@pytest.mark.parametrize("dim", [16, 48, 80, 128, 256])
def test_the_transform_is_hadamards(dim: int) -> None:
    x = np.random.default_rng(dim).standard_normal(dim).astype(np.float32)
    found = x.copy()
    run(rotate_coordinates, found)
    assert np.abs(found - rotated(x)).max() < 1e-6 * np.abs(x).max() * 4


@pytest.mark.parametrize("dim", [16, 48, 128])
def test_keys_and_values_are_the_nearest_integers(dim: int) -> None:
    layers, kv_heads = 2, 3
    cache = Int8Cache(PAGE + 20, layers, kv_heads, dim)
    keys, values = stored(cache, dim, layers, kv_heads)
    turned = rotated(cache.keys).astype(np.float32)
    # The transform's own rounding may move a coordinate that lies between two integers.
    step = np.abs(turned).max(-1, keepdims=True) / 127
    assert np.all(np.abs(keys - turned) <= 0.5001 * step)
    assert np.array_equal(values, nearest(cache.values))


class Int8Part(Part):
    """A part of a pass over an int8 cache."""

    def __init__(self, tokens: int, start: int, kv_heads: int, dim: int) -> None:
        self.tokens, self.start = tokens, start
        self.cache: Any = Int8Cache(start + tokens, 2, kv_heads, dim, seed=start)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


@pytest.mark.parametrize("dim", [16, 48, 128])
@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (1, 63), (3, 64), (17, 250), (33, 511), (1, 700)])
@pytest.mark.parametrize("group", [1, 2, 5])
def test_results_are_those_of_the_stored_integers(dim: int, tokens: int, start: int, group: int) -> None:
    part = Int8Part(tokens, start, 2, dim)
    q = queries(tokens, 2 * group, dim)
    out = attend([part], q, 2 * group, 2, 1)
    # Rounding of keys and values, of queries and of weights: each within 1/127 of the largest.
    assert relative_error(out, attended(q, part.cache, 1, start)) < 1.5e-3
    exact = Int8Part.__new__(Int8Part)
    exact.cache = part.cache
    keys, values = part.cache.keys, part.cache.values
    part.cache.keys, part.cache.values = stored(part.cache, dim, 2, 2)
    assert relative_error(out, attended(rotated(q), part.cache, 1, start)) < 5e-4
    part.cache.keys, part.cache.values = keys, values


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize(("tokens", "group", "kv_heads"), [(1, 1, 1), (1, 2, 2), (2, 3, 1)])
def test_threads_change_nothing(members: int, tokens: int, group: int, kv_heads: int) -> None:
    part = Int8Part(tokens, 2300, kv_heads, 32)
    q = queries(tokens, group * kv_heads, 32)
    alone = attend([part], q, group * kv_heads, kv_heads, 1)
    assert np.array_equal(attend([part], q, group * kv_heads, kv_heads, members), alone)
    assert np.array_equal(attend([part], q, group * kv_heads, kv_heads, members, spans=0), alone)


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 1), (2, 2), (8, 1)])
def test_a_token_is_the_same_in_any_company_to_the_bit(group: int, kv_heads: int) -> None:
    dim, heads = 32, group * kv_heads
    where = [(1, 0), (1, 1100), (33, 1020), (5, 64)]
    parts: list[Part] = [Int8Part(tokens, start, kv_heads, dim) for tokens, start in where]
    q = queries(sum(part.tokens for part in parts), heads, dim)
    together = attend(parts, q, heads, kv_heads, 1)
    first = 0
    for part in parts:
        for t in range(part.tokens):
            alone = Part.__new__(Part)
            alone.tokens, alone.start, alone.cache = 1, part.start + t, part.cache
            row = attend([alone], q[first + t : first + t + 1], heads, kv_heads, 1)
            assert np.array_equal(row[0], together[first + t])
        first += part.tokens


def test_sharp_scores_and_zeros() -> None:
    part = Int8Part(5, 300, 2, 64)
    q = queries(5, 4, 64, size=200.0)
    assert np.isfinite(attend([part], q, 4, 2, 1)).all()
    part.cache.pages[0][:] = 0
    part.cache.pages[1][:] = 0
    assert not attend([part], q, 4, 2, 1).any()


@pytest.mark.parametrize("outliers", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_long_texts_whose_keys_have_outlier_channels(outliers: float, sharpness: float) -> None:
    """16,384 positions; four of 128 coordinates of the keys are larger. The squared error is at most a thousandth."""
    dim, length = 128, 16384
    part = Int8Part.__new__(Int8Part)
    part.tokens, part.start = 1, length - 1
    part.cache = cache = Int8Cache.__new__(Int8Cache)
    rng = np.random.default_rng(int(outliers + sharpness))
    keys = rng.standard_normal((length, 1, 1, dim))
    keys[..., rng.choice(dim, 4, replace=False)] *= outliers
    keys /= np.sqrt((keys**2).mean(-1, keepdims=True))
    # The kernel runs layer 1 of 2.
    cache.keys = np.repeat(keys, 2, axis=1).astype(np.float32)
    cache.values = np.repeat(rng.standard_normal((length, 1, 1, dim)), 2, axis=1).astype(np.float32)
    size = 2 * 2 * (PAGE // 32) * int8_tile_bytes(dim)
    cache.pages = [np.zeros(size, np.uint8) for _ in range(length // PAGE)]
    cache.addresses = np.array([page.ctypes.data for page in cache.pages])
    cache.dtype = np.dtype(np.uint8)
    for position in range(length):
        append(cache, APPEND_KEY, 2, position, cache.keys[position, 1, 0].copy())
        append(cache, APPEND_VALUE, 3, position, cache.values[position, 1, 0])
    q = queries(1, 2, dim, sharpness)
    out = attend([part], q, 2, 1, 1, spans=16)
    assert relative_error(out, attended(q, part.cache, 1, length - 1)) < 1e-3
