"""The feed-forward of a sparse layer: a router, and the few experts that it chooses for each token.

Each expert's tokens lie in *segments*: one of whole tiles of the widest width, one of what is left over.  All
segments' rows are one pool of work, so that one token keeps every thread busy on its experts, and a long
prompt multiplies each expert's matrices by all tokens that chose it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.kernels.barrier import MEMBERS, acquire, claim
from npqwen.kernels.entry import run_at
from npqwen.kernels.matmul import CHUNK_BYTES
from npqwen.kernels.matrix import BLOCK_GROUPS, UNIT_COLS, unit_bytes
from npqwen.kernels.norm import silu_times
from npqwen.kernels.packing import WIDEST, pack, pack_part, packed_row_bytes, tile_width, whole_tiles
from npqwen.kernels.paging import PREFETCH_NEVER, prefetch_pages
from npqwen.simd.scalar import FAST, exp
from npqwen.simd.tile import ROWS

EXPERT, SLOT, COUNT, WIDTH = 0, 1, 2, 3
"""A segment: whose tokens, the first of its places in the arrays, how many tokens, how many a tile."""
AHEAD = 16
"""Matrices that are asked for before they are needed: all of one token's if it has 8 experts."""


def most_segments(tokens: int, experts: int, chosen: int) -> int:
    """Segments that so many tokens can make."""
    return 2 * min(experts, tokens * chosen)


def most_slots(tokens: int, experts: int, chosen: int) -> int:
    """Places that so many tokens can take, whole tiles counted."""
    return tokens * chosen + min(experts, tokens * chosen) * (WIDEST - 1)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def route(scores: Any, normalize: bool, experts: Any, weights: Any) -> None:
    """Choose experts.size distinct experts of the largest softmax(scores): their numbers and probabilities.

    scores: float32, at least as many as experts, overwritten. Of equal scores the first is chosen. normalize: divide by
    the sum of the chosen probabilities (config key norm_topk_prob). Scores that have no softmax (NaN, +inf, -inf alone)
    choose the first experts with weights of NaN, which end as NaN logits.
    """
    row_max = scores[0]
    defined = True
    for i in range(scores.size):
        row_max = max(row_max, scores[i])
        defined &= scores[i] < np.inf  # false for NaN
    if not (defined and row_max > -np.inf):
        for n in range(experts.size):
            experts[n], weights[n] = n, np.float32(np.nan)
        return
    total = np.float32(0.0)
    for i in range(scores.size):
        scores[i] = exp(scores[i] - row_max)
        total += scores[i]
    taken = np.float32(0.0)
    for n in range(experts.size):
        # Probabilities are at least 0, those already taken -1: no expert is chosen twice.
        best = 0
        for i in range(1, scores.size):
            if scores[i] > scores[best]:
                best = i
        experts[n] = best
        weights[n] = scores[best]
        taken += scores[best]
        scores[best] = np.float32(-1.0)
    scale = np.float32(1.0) / (taken if normalize else total)
    for n in range(weights.size):
        weights[n] *= scale


@njit(nogil=True)
def arrange(experts: Any, counts: Any, slots: Any, segments: Any) -> int:
    """Give every choice a slot, tokens of an expert side by side; the number of segments made.

    experts: int64 (tokens, chosen).  counts: scratch, int64 (experts,).  slots: like experts.  segments: int64 (n, 4).
    """
    counts[:] = 0
    for t in range(experts.shape[0]):
        for n in range(experts.shape[1]):
            counts[experts[t, n]] += 1
    made, slot = 0, 0
    for e in range(counts.size):
        left, first = counts[e], slot
        while left > 0:
            width = WIDEST if left >= WIDEST else tile_width(left)
            count = left // WIDEST * WIDEST if left >= WIDEST else left
            segments[made, EXPERT], segments[made, SLOT] = e, slot
            segments[made, COUNT], segments[made, WIDTH] = count, width
            made += 1
            slot += whole_tiles(count, width)
            left -= count
        counts[e] = first
    for t in range(experts.shape[0]):
        for n in range(experts.shape[1]):
            e = experts[t, n]
            slots[t, n] = counts[e]
            counts[e] += 1
    return made


@njit(nogil=True)
def pack_choices(team: Any, normed: Any, slots: Any, segments: Any, made: int, encoding: int, packed: Any) -> None:
    """packed = normed (tokens, cols), each token in all of its slots; a lone token once for all."""
    size = packed_row_bytes(encoding, normed.shape[1])
    tokens = slots.shape[0]
    if tokens == 1:
        if claim(team, 1) == 0:
            pack(normed[0], 0, 1, encoding, packed)
        return
    while True:
        t = claim(team, 1)
        if t >= tokens + made:
            return
        if t < tokens:
            for n in range(slots.shape[1]):
                s = find_segment(segments, made, slots[t, n])
                first = segments[s, SLOT]
                pack(normed[t], slots[t, n] - first, segments[s, WIDTH], encoding, packed[first * size :])
        else:
            _, first, count, width = segments[t - tokens]
            for lane in range(count, whole_tiles(count, width)):
                pack(normed[0], lane, width, encoding, packed[first * size :])


@njit(nogil=True)
def find_segment(segments: Any, made: int, slot: int) -> int:
    """The segment a slot is in; slots ascend."""
    low, high = 0, made - 1
    while low < high:
        middle = (low + high + 1) // 2
        if segments[middle, SLOT] <= slot:
            low = middle
        else:
            high = middle - 1
    return low


@njit(nogil=True)
def prefetch_matrix(how: int, layer: Any, segments: Any, made: int, n: int, scratch: Any) -> None:
    """Have the system read the n-th matrix that a layer needs: the segments' gate_up_proj, then their down_proj."""
    seen = scratch.view(np.uint8)
    s = n % made
    if n >= 2 * made or (s and segments[s, EXPERT] == segments[s - 1, EXPERT]):
        return
    address = layer.gate_up_proj.address + segments[s, EXPERT] * layer.expert_bytes
    down = layer.down_proj.address - layer.gate_up_proj.address
    if n < made:
        prefetch_pages(how, address, down, seen)
    else:
        prefetch_pages(how, address + down, layer.expert_bytes - down, seen)


@njit(nogil=True)
def prefetch_first_matrices(team: Any, how: int, layer: Any, segments: Any, made: int, scratch: Any) -> None:
    """Have the system read the first matrices that a layer needs; the rest is asked for on the way."""
    while True:
        n = claim(team, 1)
        if n >= AHEAD:
            return
        prefetch_matrix(how, layer, segments, made, n, scratch)


@njit(nogil=True)
def take_piece(team: Any, matrix: Any, made: int, multiple: int, most: int) -> Any:
    """A segment and the groups of its expert's rows that this thread computes next: (segment, first, last).

    segment is `made` when none is left.  A piece has at most `most` groups of rows, and begins at a multiple of
    `multiple`.
    """
    groups = matrix.rows // ROWS
    share = made * groups // (8 * acquire(team, MEMBERS))
    fitting = CHUNK_BYTES // (matrix.cols // UNIT_COLS * unit_bytes(matrix.encoding))
    chunk = max(multiple, min(share, fitting, most, groups) // multiple * multiple)
    pieces = (groups + chunk - 1) // chunk
    task = claim(team, 1)
    first = task % pieces * chunk
    return min(task // pieces, made), first, min(first + chunk, groups)


@njit(nogil=True)
def _run(
    kernels: Any, layer: Any, matrix: Any, segment: Any, tiles: int, x_at: int, first: int, last: int, out_at: int,
    stride: int, scratch: Any,
) -> None:  # fmt: skip
    """The kernel for some groups of rows of a segment's expert and some of its tiles of tokens."""
    expert, _, _, width = segment
    run_at(
        kernels[matrix.encoding, width],
        (
            matrix.address + expert * layer.expert_bytes, matrix.cols // UNIT_COLS, first, last, x_at, tiles, out_at,
            stride, 0, scratch.ctypes.data,
        ),
    )  # fmt: skip


@njit(nogil=True)
def project_gated_slots(
    team: Any, kernels: Any, layer: Any, how: int, segments: Any, made: int, tokens: int, x: Any, piece: Any,
    scratch: Any, gated: Any,
) -> None:  # fmt: skip
    """gated[slot] = silu(gate_proj @ x[slot]) * (up_proj @ x[slot]) of the slot's expert, packed for down_proj.

    kernels: see `matmul_kernels`.  layer: a LAYER.  how: to ask for the matrices to come (paging.py).  x: packed, each
    segment where its first slot is; of a pass of one token that alone, for all.  A thread goes on with the rows that it
    has computed: they are in its own cache, `piece`.
    """
    matrix, cols, encoding = layer.gate_up_proj, layer.down_proj.cols, layer.down_proj.encoding
    size = 0 if tokens == 1 else packed_row_bytes(matrix.encoding, matrix.cols)
    gated_size = packed_row_bytes(encoding, cols)
    most = piece.size // (whole_tiles(tokens, WIDEST) * ROWS)
    while True:
        s, first, last = take_piece(team, matrix, made, BLOCK_GROUPS, most)
        if s == made:
            return
        if how != PREFETCH_NEVER and first == 0:
            prefetch_matrix(how, layer, segments, made, s + AHEAD, scratch)
        _, slot, count, width = segments[s]
        rows = ROWS * (last - first)
        # Kernels count rows from the matrix's first.
        place = piece.ctypes.data - piece.itemsize * ROWS * first
        # All of the segment's tokens unless it has more than the pass, which no routing may make it have.
        fitting = piece.size // rows // width * width
        # After the last rows come zeros up to whole units of columns.
        product = scratch[: cols - ROWS * first // 2 if ROWS * last == matrix.rows else rows // 2]
        padded = whole_tiles(count, width)
        for start in range(0, padded, fitting):
            batch = min(fitting, padded - start)
            x_at = x.ctypes.data + (slot + start) * size
            _run(kernels, layer, matrix, segments[s], batch // width, x_at, first, last, place, rows, scratch)
            # The kernel may have used scratch.
            product[rows // 2 :] = np.float32(0.0)
            for t in range(batch):
                silu_times(piece[t * rows : (t + 1) * rows], product)
                pack_part(product, ROWS * first // 2, cols, start + t, width, encoding, gated[slot * gated_size :])


@njit(nogil=True)
def multiply_slots(
    team: Any, kernels: Any, layer: Any, how: int, segments: Any, made: int, gated: Any, out: Any, scratch: Any
) -> None:
    """out[slot] = down_proj of the slot's expert @ gated[slot], for all segments; out: float32 (slots, >= rows)."""
    matrix = layer.down_proj
    size = packed_row_bytes(matrix.encoding, matrix.cols)
    while True:
        s, first, last = take_piece(team, matrix, made, 1, matrix.rows)
        if s == made:
            return
        if how != PREFETCH_NEVER and first == 0:
            prefetch_matrix(how, layer, segments, made, made + s + AHEAD, scratch)
        _, slot, count, width = segments[s]
        tiles = whole_tiles(count, width) // width
        place = out.ctypes.data + slot * out.itemsize * out.shape[1]
        x_at = gated.ctypes.data + slot * size
        _run(kernels, layer, matrix, segments[s], tiles, x_at, first, last, place, out.shape[1], scratch)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def combine(team: Any, results: Any, slots: Any, weights: Any, hidden: Any) -> None:
    """hidden[t] += the sum of weights[t, n] * results[slots[t, n]]."""
    while True:
        t = claim(team, 1)
        if t >= slots.shape[0]:
            return
        line = hidden[t]
        for n in range(slots.shape[1]):
            result, weight = results[slots[t, n]], weights[t, n]
            for i in range(line.size):
                line[i] += weight * result[i]
