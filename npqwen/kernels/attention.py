"""Causal attention over a KV cache, with an online softmax (Milakov & Gimelshein 2018, Dao et al. 2022).

The query heads that share a key/value head are rows of one product, and so are neighbouring tokens of a sequence: each
key and value is read once for all of them. Row r of a key/value head is query head `r % group` of the sequence's token
`r // group`, group being the query heads per key/value head. npqwen/kernels/cache_page.py has the layout of keys and
values.

Positions are split into spans of `SPAN`, whose results are merged from the first to the last, whichever threads compute
them. So a token's result depends, bitwise, on its own sequence alone: not on the other tokens of the pass, nor on the
threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from npqwen.kernels.compiled import address_of
from npqwen.kernels.entry import run_at
from npqwen.kernels.float_attention import MEMORY_BOUND_ROWS, float_attention
from npqwen.kernels.int8_attention import WEIGHT_FLOATS, int8_attention, pack_queries
from npqwen.kernels.online_softmax import SCORE_BLOCK, merge
from npqwen.kernels.pieces import MEMBERS, claim, claim_private, finish_first, is_needed
from npqwen.simd.isa import ISA

MAX_ROWS = ISA.rows[-1]
_ROWS = ISA.rows
_SCORE_FLOATS = SCORE_BLOCK + WEIGHT_FLOATS
"""float32 of a row's scores, and of its weights as the int8 kernel packs them."""
SPAN = 1024
"""Positions whose results are computed separately, then merged; each span is a task if heads and tiles are too few for
all threads."""

SEQUENCE = np.dtype(
    [
        ("first", np.int64),
        ("tokens", np.int64),
        ("start", np.int64),
        ("pages", np.int64),
        ("draft_tokens", np.int64),
        ("pending", np.int64),
        ("state", np.int64),
        ("next_state", np.int64),
        ("pending_rows", np.int64),
        ("next_pending_rows", np.int64),
    ]
)
"""A sequence's tokens in a pass, and its cache.

first: the index, in the pass, of the first of its `tokens`. start: that token's position. pages: the address of an
array of int64, the addresses of the pages that hold its keys and values. The others are those of recurrent layers
(npqwen/kernels/gated_delta.py), 0 where there are none.
"""


def scratch_floats(head_dim: int) -> int:
    """float32 of scratch for one thread's attention: queries, scores, and the results of one span and of all."""
    return MAX_ROWS * (3 * head_dim + _SCORE_FLOATS + 4)


def partial_floats(kv_heads: int, group: int, head_dim: int, context: int) -> int:
    """float32 of the results of all spans of MEMORY_BOUND_ROWS tokens of the longest sequence, see `is_divided`."""
    return kv_heads * -(-context // SPAN) * row_width.py_func(MEMORY_BOUND_ROWS * group) * (head_dim + 2)


KERNELS = {
    np.dtype(np.uint8): {rows: int8_attention(rows) for rows in _ROWS},
    np.dtype(np.uint16): {rows: float_attention(rows, np.uint16) for rows in _ROWS},
    np.dtype(np.float32): {rows: float_attention(rows, np.float32) for rows in _ROWS},
}
"""The kernels by the dtype of the cache, then by the number of rows."""


def attention_kernels(dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """Addresses of the kernels for a dtype of the cache, compiled or loaded: [rows], 0 where there is none."""
    addresses = np.zeros(MAX_ROWS + 1, np.int64)
    for rows, kernel in KERNELS[dtype].items():
        addresses[rows] = address_of(kernel)
    return addresses


@njit(nogil=True, error_model="numpy")
def _gather(
    q: Any, first: int, head: int, group: int, rows: int, first_row: int, width: int, dim: int, out: Any
) -> None:
    """out = the queries of `width` rows starting at first_row, (head_dim, width); zeros past the last of `rows` rows.

    first: the index of the sequence's first token in q.
    """
    for t in range(width):
        row = first_row + t
        if row < rows:
            at = (head * group + row % group) * dim
            line = q[first + row // group]
            for i in range(dim):
                out[i * width + t] = line[at + i]
        else:
            for i in range(dim):
                out[i * width + t] = np.float32(0.0)


@njit(nogil=True)
def row_width(rows: int) -> int:
    """How many rows to multiply at once: all of them if they fit, so that keys and values are read once."""
    for width in _ROWS:
        if width >= rows:
            return width
    return MAX_ROWS


@njit(nogil=True)
def _row_tiles(sequence: Any, group: int) -> Any:
    """A sequence's rows, how many of them are multiplied at once, and how many such tiles there are."""
    rows = sequence.tokens * group
    width = row_width(rows)
    return rows, width, (rows + width - 1) // width


@njit(nogil=True)
def _span_count(sequence: Any) -> int:
    """How many spans cover the positions that a sequence's tokens attend to."""
    return (sequence.start + sequence.tokens + SPAN - 1) // SPAN


@njit(nogil=True)
def is_divided(team: Any, sequences: Any, group: int, kv_heads: int, dim: int, room: int) -> bool:
    """Whether each span is a task, as heads and tiles are too few for all threads; room: float32 for the results."""
    members = team[MEMBERS]
    tasks, floats = 0, 0
    for i in range(sequences.size):
        _, width, tiles = _row_tiles(sequences[i], group)
        tasks += kv_heads * tiles
        floats += kv_heads * tiles * _span_count(sequences[i]) * width * (dim + 2)
    return members > 1 and tasks < 4 * members and floats <= room


@njit(nogil=True)
def _task_count(sequences: Any, group: int, kv_heads: int, divided: bool) -> int:
    """The number of tasks, each of a head and a tile of rows, and, if divided, a span."""
    tasks = 0
    for i in range(sequences.size):
        tasks += kv_heads * _row_tiles(sequences[i], group)[2] * (_span_count(sequences[i]) if divided else 1)
    return tasks


@njit(nogil=True)
def attention(
    team: Any, kernels: Any, q: Any, sequences: Any, is_int8: bool, layer: int, heads: int, kv_heads: int, dim: int,
    partials: Any, scratch: Any, out: Any,
) -> None:  # fmt: skip
    """out[t, head] = softmax(q[t, head] @ keys.T) @ values over the positions of t's sequence up to its own.

    All members of the team call it, and share the sequences, heads, tiles of rows and spans.
    kernels: see `attention_kernels`. q: float32 (tokens, >= heads * dim), rotated and scaled by 1/sqrt(dim). sequences:
    SEQUENCE records, in the order of their tokens. is_int8: whether the kernels are those of an int8 cache. layer: its
    index among the layers in the cache. partials: float32 shared by the team, flat, see `partial_floats`. scratch: this
    thread's float32 (scratch_floats(dim),). out: float32 (tokens, >= heads * dim).
    """
    group = heads // kv_heads
    divided = is_divided(team, sequences, group, kv_heads, dim, partials.size)
    pieces = _task_count(sequences, group, kv_heads, divided)
    i, before, place = 0, 0, 0
    task = claim_private(team, pieces)
    while task < pieces:
        if task < before:  # a piece taken over from another thread
            i, before, place = 0, 0, 0
        sequence = sequences[i]
        rows, width, tiles = _row_tiles(sequence, group)
        spans = _span_count(sequence)
        size = width * (dim + 2)
        units = spans if divided else 1
        tasks = kv_heads * tiles * units
        if task >= before + tasks:
            i, before, place = i + 1, before + tasks, place + tasks * size
            continue
        at = task - before
        # The last tiles see the most positions: they go first.
        unit, tile, head = at % units, tiles - 1 - at // units // kv_heads, at // units % kv_heads
        first_row = tile * width
        last_seen = sequence.start + (min(first_row + width, rows) - 1) // group + 1
        queries, rest = scratch[: width * dim], scratch[width * dim :]
        if is_int8:
            pack_queries(q, sequence.first, head, group, rows, first_row, width, dim, rest, queries)
        else:
            _gather(q, sequence.first, head, group, rows, first_row, width, dim, queries)
        key_index = 2 * layer * kv_heads + head
        partial = rest[width * _SCORE_FLOATS : width * _SCORE_FLOATS + size]
        merged = rest[width * _SCORE_FLOATS + size : width * _SCORE_FLOATS + 2 * size]
        for span in range(unit if divided else 0, unit + 1 if divided else spans):
            if not is_needed(team):
                break
            run_at(
                kernels[width],
                (
                    queries.ctypes.data, dim, sequence.pages, key_index, key_index + kv_heads, span * SPAN,
                    min((span + 1) * SPAN, last_seen), sequence.start, first_row, group, rest.ctypes.data,
                    partial.ctypes.data,
                ),
            )  # fmt: skip
            if divided:
                continue
            if span > 0:
                merge(merged, partial, width, dim)
            elif spans > 1:
                _copy(partial, size, merged, np.int64(0))
        if finish_first(team):
            if divided:
                _copy(partial, size, partials, place + at * size)
            else:
                result = merged if spans > 1 else partial
                _normalize(result, width, dim, rows, first_row, group, head, out[sequence.first :])
        task = claim_private(team, pieces)
    if divided:
        _merge_spans(team, sequences, group, kv_heads, dim, partials, out)


@njit(nogil=True)
def _merge_spans(team: Any, sequences: Any, group: int, kv_heads: int, dim: int, partials: Any, out: Any) -> None:
    """Merge the results of all spans, from the first to the last, as a thread does that computes all of them."""
    i, before, place = 0, 0, 0
    pieces = _task_count(sequences, group, kv_heads, False)
    task = claim(team, pieces)
    while task < pieces:
        sequence = sequences[i]
        rows, width, tiles = _row_tiles(sequence, group)
        spans, size = _span_count(sequence), width * (dim + 2)
        tasks = kv_heads * tiles
        if task >= before + tasks:
            i, before, place = i + 1, before + tasks, place + tasks * spans * size
            continue
        at = task - before
        first = place + at * spans * size
        merged = partials[first : first + size]
        for span in range(1, spans):
            merge(merged, partials[first + span * size : first + (span + 1) * size], width, dim)
        tile, head = tiles - 1 - at // kv_heads, at % kv_heads
        _normalize(merged, width, dim, rows, tile * width, group, head, out[sequence.first :])
        task = claim(team, pieces)


@njit(nogil=True)
def _copy(source: Any, size: int, target: Any, at: int) -> None:
    """target[at : at + size] = source[:size]; for that, Numba would compile its formatted error message, too."""
    for i in range(size):
        target[at + i] = source[i]


@njit(nogil=True, error_model="numpy")
def _normalize(partial: Any, width: int, dim: int, rows: int, first_row: int, group: int, head: int, out: Any) -> None:
    """out = accumulator / denominator, each row at its token and head; out begins with the first token."""
    for t in range(min(width, rows - first_row)):
        row = first_row + t
        line = out[row // group]
        at = (head * group + row % group) * dim
        scale = np.float32(1.0) / partial[width * (dim + 1) + t]
        for i in range(dim):
            line[at + i] = partial[t * dim + i] * scale
