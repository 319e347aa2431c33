"""The feed-forward of a sparse layer: a router, and the few experts that it chooses for each token.

Each expert's tokens lie in *segments*: one of whole tiles of the widest width, one of what is left over.  All
segments' rows are one pool of work, so that one token keeps every thread busy on its experts, and a long
prompt multiplies each expert's matrices by all tokens that chose it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.kernels.entry import run_at
from npqwen.kernels.matmul import CHUNK_BYTES
from npqwen.kernels.matrix import UNIT_COLS, unit_bytes
from npqwen.kernels.norm import silu_times
from npqwen.kernels.packing import BLOCK, BLOCK_BYTES, WIDEST, pack, tile_width
from npqwen.paging import NEVER, ask_for
from npqwen.simd.scalar import FAST, exp
from npqwen.simd.tile import ROWS
from npqwen.team import MEMBERS, acquire, take

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
    """Choose experts.size experts of the largest softmax(scores): their numbers and probabilities.

    scores: float32, overwritten.  Of equals the first is taken.  normalize: divide by the sum of the chosen
    (config key norm_topk_prob).
    """
    peak = scores[0]
    for i in range(scores.size):
        peak = max(peak, scores[i])
    total = np.float32(0.0)
    for i in range(scores.size):
        scores[i] = exp(scores[i] - peak)
        total += scores[i]
    taken = np.float32(0.0)
    for n in range(experts.size):
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
            slot += (count + width - 1) // width * width
            left -= count
        counts[e] = first
    for t in range(experts.shape[0]):
        for n in range(experts.shape[1]):
            e = experts[t, n]
            slots[t, n] = counts[e]
            counts[e] += 1
    return made


@njit(nogil=True)
def row_bytes(bits: int, cols: int) -> int:
    """Bytes that one token's packed activations take."""
    return cols * 4 if bits == 16 else cols // BLOCK * BLOCK_BYTES


@njit(nogil=True)
def pack_choices(team: Any, normed: Any, slots: Any, segments: Any, made: int, bits: int, packed: Any) -> None:
    """packed = normed (tokens, cols), each token in all of its slots; a lone token once for all."""
    size = row_bytes(bits, normed.shape[1])
    tokens = slots.shape[0]
    while True:
        t = take(team, 1)
        if t >= tokens:
            return
        if tokens == 1:
            pack(normed[0], 0, 1, bits, packed)
            return
        for n in range(slots.shape[1]):
            s = find_segment(segments, made, slots[t, n])
            first = segments[s, SLOT]
            pack(normed[t], slots[t, n] - first, segments[s, WIDTH], bits, packed[first * size :])


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
def silu_and_pack_slots(
    team: Any, gate_up: Any, segments: Any, made: int, bits: int, scratch: Any, packed: Any
) -> None:
    """packed = silu(gate) * up for every slot."""
    product = scratch[: gate_up.shape[1] // 2]
    size = row_bytes(bits, product.size)
    last = segments[made - 1, SLOT] + segments[made - 1, COUNT]
    while True:
        slot = take(team, 1)
        if slot >= last:
            return
        s = find_segment(segments, made, slot)
        first = segments[s, SLOT]
        if slot < first + segments[s, COUNT]:
            silu_times(gate_up[slot], product)
            pack(product, slot - first, segments[s, WIDTH], bits, packed[first * size :])


@njit(nogil=True)
def ask_for_matrix(how: int, layer: Any, segments: Any, made: int, n: int, scratch: Any) -> None:
    """Have the system read the n-th matrix that a layer needs: the segments' gate_up_proj, then their down_proj."""
    seen = scratch.view(np.uint8)
    s = n % made
    if n >= 2 * made or (s and segments[s, EXPERT] == segments[s - 1, EXPERT]):
        return
    address = layer.gate_up_proj.address + segments[s, EXPERT] * layer.expert_bytes
    down = layer.down_proj.address - layer.gate_up_proj.address
    if n < made:
        ask_for(how, address, down, seen)
    else:
        ask_for(how, address + down, layer.expert_bytes - down, seen)


@njit(nogil=True)
def ask_for_first(team: Any, how: int, layer: Any, segments: Any, made: int, scratch: Any) -> None:
    """Have the system read the first matrices that a layer needs; `experts_matmul` asks for the others."""
    while True:
        n = take(team, 1)
        if n >= AHEAD:
            return
        ask_for_matrix(how, layer, segments, made, n, scratch)


@njit(nogil=True)
def experts_matmul(
    team: Any, kernels: Any, layer: Any, down: bool, how: int, segments: Any, made: int, x: Any, together: bool,
    out: Any, scratch: Any,
) -> None:  # fmt: skip
    """out[slot] = weight of the slot's expert @ x[slot], for all segments.

    kernels: see `matmul_kernels`.  layer: a LAYER; down: its down_proj, else its gate_up_proj.  how: to ask for the
    matrices to come (paging.py).  x: packed, each segment where its first slot is, or one token for all if
    `together`.  out: float32 (slots, >= rows).
    """
    matrix = layer.down_proj if down else layer.gate_up_proj
    units = matrix.cols // UNIT_COLS
    unit = unit_bytes(matrix.bits)
    groups = matrix.rows // ROWS
    share = made * groups // (8 * acquire(team, MEMBERS))
    chunk = max(1, min(share, CHUNK_BYTES // (units * unit), groups))
    pieces = (groups + chunk - 1) // chunk
    size = 0 if together else row_bytes(matrix.bits, matrix.cols)
    while True:
        task = take(team, 1)
        if task >= made * pieces:
            return
        s = task // pieces
        first = task % pieces * chunk
        last = min(first + chunk, groups)
        if how != NEVER and first == 0:
            ask_for_matrix(how, layer, segments, made, (made + s if down else s) + AHEAD, scratch)
        expert, slot, count, width = segments[s]
        tiles = (count + width - 1) // width
        run_at(
            kernels[matrix.bits // 8, width],
            (
                matrix.address + expert * layer.expert_bytes, units, first, last, x.ctypes.data + slot * size, tiles,
                out.ctypes.data + slot * out.itemsize * out.shape[1], out.shape[1], 0, scratch.ctypes.data,
            ),
        )  # fmt: skip


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def combine(team: Any, results: Any, slots: Any, weights: Any, hidden: Any) -> None:
    """hidden[t] += the sum of weights[t, n] * results[slots[t, n]]."""
    while True:
        t = take(team, 1)
        if t >= slots.shape[0]:
            return
        line = hidden[t]
        for n in range(slots.shape[1]):
            result, weight = results[slots[t, n]], weights[t, n]
            for i in range(line.size):
                line[i] += weight * result[i]
