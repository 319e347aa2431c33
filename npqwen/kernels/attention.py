"""Causal attention over a KV cache, with an online softmax (Milakov & Gimelshein 2018, Dao et al. 2022).

The query heads that share a key/value head are rows of one product, and so are neighbouring tokens: each key and
value is read once for all of them.  Row r of a key/value head is query head `r % group` of token `r // group`,
group being query heads per key/value head.

The cache comes in pages of `PAGE` positions, of float16 (uint16 to Numba) or float32, as the array `like` is.  A
page holds, layer by layer, the keys of each head and then the values of each.  Keys lie in groups of 16
positions, (16 positions, head_dim) turned to (head_dim, 16): a vector holds one coordinate of many positions,
and scores need no sums across a vector.  Values lie as (position, head_dim).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from npqwen.kernels.barrier import MEMBERS, acquire, barrier, claim
from npqwen.kernels.compiled import address_of
from npqwen.kernels.entry import entry, run_at
from npqwen.simd.instructions import CACHE_LINE
from npqwen.simd.isa import ISA
from npqwen.simd.scalar import FAST, exp, half, memory
from npqwen.simd.tile import LANES, add, chains, multiply_cached, prefetch, softmax_block, store_apart, zeros

PAGE = 256
BLOCK = 64
"""Positions whose scores are computed before they are used."""
TILE = 16
STREAMED = 4
"""Rows of a product up to which memory is the limit, so that keys and values are worth asking for early."""
AHEAD = 8192
"""Bytes between what is then read and what is asked for: two groups of float16 keys, 128 coordinates each."""
MOST_ROWS = ISA.rows[-1]
_ROWS = ISA.rows
_LOWEST = np.float32(-3.0e38)
_LONG = 512
"""Positions that are worth a task of their own when there are fewer heads than threads."""


def page_items(layers: int, kv_heads: int, head_dim: int) -> int:
    """Numbers in a page of the cache."""
    return layers * 2 * kv_heads * PAGE * head_dim


def _stored(value, like):  # type: ignore[no-untyped-def]  # Numba wants the very same signature below
    """A float32 as the cache holds it: as it is, or as the bits of a float16."""
    raise NotImplementedError("compiled code only")


@overload(_stored)
def _compiled_stored(value, like):  # type: ignore[no-untyped-def]
    if like.dtype == types.float32:
        return lambda value, like: value
    return lambda value, like: half(value)


@njit(nogil=True)
def _head(pages: Any, like: Any, position: int, which: int, head_dim: int) -> Any:
    """The keys or values of one head in the page that holds a position: (PAGE * head_dim,) of like's dtype."""
    size = PAGE * head_dim
    return memory(pages[position // PAGE] + like.itemsize * which * size, size, like.dtype)


@njit(nogil=True)
def store_key(pages: Any, like: Any, which: int, position: int, key: Any) -> None:
    """Put one head's key (head_dim,) float32 into the cache; which = (layer * 2) * kv_heads + head."""
    place = position % PAGE
    keys = _head(pages, like, position, which, key.size)
    at = place // TILE * TILE * key.size + place % TILE
    for i in range(key.size):
        keys[at + i * TILE] = _stored(key[i], like)


@njit(nogil=True)
def store_value(pages: Any, like: Any, which: int, position: int, value: Any) -> None:
    """Put one head's value (head_dim,) float32 into the cache; which = (layer * 2 + 1) * kv_heads + head."""
    at = position % PAGE * value.size
    values = _head(pages, like, position, which, value.size)
    for i in range(value.size):
        values[at + i] = _stored(value[i], like)


def scratch_floats(head_dim: int) -> int:
    """float32 that one thread's attention needs."""
    return MOST_ROWS * (2 * head_dim + BLOCK + 2)


def _attend(tokens: int, dtype: Any) -> Any:
    """The kernel for tiles of `tokens` rows of queries, and a cache of this dtype."""
    # Scores: a vector holds positions.  Sums: it holds coordinates, `wide` of them where there are so many.
    score_rows = max(1, min(TILE // LANES, ISA.accumulators // tokens))
    together = min(2, chains(tokens * score_rows))
    sum_rows = max(1, ISA.accumulators // tokens)
    wide, narrow = sum_rows * LANES, TILE // LANES

    size = np.dtype(dtype).itemsize
    ahead = AHEAD // size

    @entry(tokens, np.dtype(dtype).name, error_model="numpy", fastmath=FAST)
    def attend(
        queries_at: int, dim: int, pages_at: int, keys_of: int, values_of: int, low: int, high: int, start: int,
        first_row: int, group: int, scratch_at: int,
    ) -> None:  # fmt: skip
        """Attention of `tokens` rows over positions low to high: sums, top and total are left in scratch.

        queries: (head_dim, tokens).
        """
        queries = memory(queries_at, dim * tokens, np.float32)
        pages = memory(pages_at, (high + PAGE - 1) // PAGE, np.int64)
        scratch = memory(scratch_at, tokens * (BLOCK + dim + 2), np.float32)
        scores = scratch[: tokens * BLOCK]
        sums = scratch[tokens * BLOCK : tokens * (BLOCK + dim)]
        top = scratch[tokens * (BLOCK + dim) : tokens * (BLOCK + dim + 1)]
        total = scratch[tokens * (BLOCK + dim + 1) : tokens * (BLOCK + dim + 2)]
        sums[:] = np.float32(0.0)
        top[:] = _LOWEST
        total[:] = np.float32(0.0)
        for block in range(low, high, BLOCK):
            count = (min(BLOCK, high - block) + TILE - 1) // TILE * TILE
            page = pages[block // PAGE]
            keys = memory(page + size * PAGE * dim * keys_of, PAGE * dim, dtype)
            values = memory(page + size * PAGE * dim * values_of, PAGE * dim, dtype)
            at = block % PAGE * dim
            # Several groups of keys at a time, not several sums a score: decoding adds in the order of prefill.
            for place in range(0, count, together * TILE):
                for row in range(0, TILE, score_rows * LANES):
                    products = zeros(tokens, score_rows, together)
                    k = at + place * dim + row
                    for i in range(0, queries.size, tokens):
                        if tokens <= STREAMED:
                            prefetch(keys, k + ahead, CACHE_LINE)
                            prefetch(keys, k + ahead + (together - 1) * TILE * dim, CACHE_LINE)
                        else:
                            # Arithmetic is the limit: there is time to have this block's values brought near.
                            first = at + place * dim
                            prefetch(values, first + together * (k - row - first), CACHE_LINE)
                        products = multiply_cached(products, tokens, together, keys, k, TILE * dim, queries, i, 0, 1)
                        k += TILE
                    store_apart(products, together, scores, place + row, TILE, score_rows, BLOCK)
            for t in range(tokens):
                visible = max(0, min(count, start + (first_row + t) // group + 1 - block))
                peak, weight = softmax_block(scores, t * BLOCK, BLOCK, visible, top[t])
                if peak > top[t]:
                    shrink = exp(top[t] - peak)
                    total[t] *= shrink
                    for i in range(t * dim, (t + 1) * dim):
                        sums[i] *= shrink
                    top[t] = peak
                total[t] += weight
            column = 0
            while column + wide <= dim:
                outs = zeros(tokens, sum_rows, 1)
                v = at + column
                for i in range(count):
                    if tokens <= STREAMED:
                        prefetch(values, v + ahead, 256)
                    else:  # the next block's keys
                        prefetch(keys, at + BLOCK * (dim + column) + i * wide, CACHE_LINE)
                    outs = multiply_cached(outs, tokens, 1, values, v, 0, scores, i, 0, BLOCK)
                    v += dim
                add(outs, sums, column, sum_rows, dim)
                column += wide
            while column < dim:
                rest = zeros(tokens, narrow, 1)
                v = at + column
                for i in range(count):
                    rest = multiply_cached(rest, tokens, 1, values, v, 0, scores, i, 0, BLOCK)
                    v += dim
                add(rest, sums, column, narrow, dim)
                column += TILE

    return attend


KERNELS = {
    dtype: {rows: _attend(rows, dtype) for rows in _ROWS} for dtype in (np.dtype(np.uint16), np.dtype(np.float32))
}
"""The kernel for each dtype of the cache (as `like` has it) and number of rows a tile."""


def attention_kernels(dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """Where the machine code for a dtype of the cache is: (MOST_ROWS + 1,), [rows a tile]; the rest is 0."""
    addresses = np.zeros(MOST_ROWS + 1, np.int64)
    for rows, kernel in KERNELS[dtype].items():
        addresses[rows] = address_of(kernel)
    return addresses


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _gather(q: Any, head: int, group: int, rows: int, first_row: int, width: int, dim: int, out: Any) -> None:
    """The queries of some rows as (head_dim, width); zeros past the last row."""
    for t in range(width):
        row = first_row + t
        if row < rows:
            at = (head * group + row % group) * dim
            line = q[row // group]
            for i in range(dim):
                out[i * width + t] = line[at + i]
        else:
            for i in range(dim):
                out[i * width + t] = np.float32(0.0)


@njit(nogil=True)
def row_width(rows: int) -> int:
    """How many rows are multiplied at once: all if they fit, so that keys and values are read once."""
    for width in _ROWS:
        if width >= rows:
            return width
    return MOST_ROWS


@njit(nogil=True)
def splits(team: Any, tokens: int, heads: int, kv_heads: int, end: int) -> int:
    """Into how many parts the positions are cut, so that all threads have work at one token's decode."""
    rows = tokens * (heads // kv_heads)
    width = row_width(rows)
    tasks = kv_heads * ((rows + width - 1) // width)
    members = acquire(team, MEMBERS)
    if tasks >= 4 * members or members == 1:
        return 1
    return max(1, min((4 * members + tasks - 1) // tasks, end // _LONG))


@njit(nogil=True)
def attention(
    team: Any, kernels: Any, q: Any, tokens: int, pages: Any, like: Any, layer: int, heads: int, kv_heads: int,
    dim: int, start: int, parts: Any, scratch: Any, out: Any,
) -> None:  # fmt: skip
    """out[t, head] = softmax(q[t, head] @ keys.T) @ values over positions 0 to start + t.

    kernels: see `attention_kernels`.  q: float32 (tokens, >= heads * dim), rotated and scaled by 1/sqrt(dim).  out:
    float32 (tokens, heads * dim).  scratch: this thread's float32 (scratch_floats(dim),).  parts: float32 shared by the
    team, for what a split leaves.
    """
    group = heads // kv_heads
    rows = tokens * group
    width = row_width(rows)
    tiles = (rows + width - 1) // width
    end = start + tokens
    cuts = splits(team, tokens, heads, kv_heads, end)
    span = ((end + cuts - 1) // cuts + BLOCK - 1) // BLOCK * BLOCK
    size = width * (dim + 2)
    tasks = kv_heads * tiles * cuts
    while True:
        task = claim(team, 1)
        if task >= tasks:
            break
        # The last tiles see the most positions: they go first.
        cut, tile, head = task % cuts, tiles - 1 - task // cuts // kv_heads, task // cuts % kv_heads
        first_row = tile * width
        last_seen = start + (min(first_row + width, rows) - 1) // group + 1
        queries = scratch[: width * dim]
        rest = scratch[width * dim :]
        _gather(q, head, group, rows, first_row, width, dim, queries)
        keys_of = 2 * layer * kv_heads + head
        low, high = cut * span, min((cut + 1) * span, last_seen)
        run_at(
            kernels[width],
            (
                queries.ctypes.data, dim, pages.ctypes.data, keys_of, keys_of + kv_heads, low, high, start, first_row,
                group, rest.ctypes.data,
            ),
        )  # fmt: skip
        left = rest[width * BLOCK : width * BLOCK + size]
        if cuts == 1:
            _finish(left, width, dim, rows, first_row, group, head, out)
        else:
            parts[task * size : (task + 1) * size] = left
    if cuts > 1:
        barrier(team)
        while True:
            task = claim(team, 1)
            if task >= kv_heads * tiles:
                break
            tile, head = tiles - 1 - task // kv_heads, task % kv_heads
            whole = parts[task * cuts * size : (task * cuts + 1) * size]
            for cut in range(1, cuts):
                _merge(whole, parts[(task * cuts + cut) * size : (task * cuts + cut + 1) * size], width, dim)
            _finish(whole, width, dim, rows, tile * width, group, head, out)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _merge(whole: Any, part: Any, width: int, dim: int) -> None:
    """Add the attention over other positions to one over some: sums, then top, then total."""
    tops, totals = width * dim, width * (dim + 1)
    for t in range(width):
        top = max(whole[tops + t], part[tops + t])
        a, b = exp(whole[tops + t] - top), exp(part[tops + t] - top)
        for i in range(t * dim, (t + 1) * dim):
            whole[i] = whole[i] * a + part[i] * b
        whole[tops + t] = top
        whole[totals + t] = whole[totals + t] * a + part[totals + t] * b


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _finish(left: Any, width: int, dim: int, rows: int, first_row: int, group: int, head: int, out: Any) -> None:
    """Divide by the softmax's total, and put each row where its token and head belong."""
    for t in range(min(width, rows - first_row)):
        row = first_row + t
        line = out[row // group]
        at = (head * group + row % group) * dim
        scale = np.float32(1.0) / left[width * (dim + 1) + t]
        for i in range(dim):
            line[at + i] = left[t * dim + i] * scale
