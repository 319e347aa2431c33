"""The feed-forward of a sparse layer: a router, and the few experts that it chooses for each token.

The tokens of an expert lie side by side in *slots* and form *segments*: one of whole tiles of the widest width and one
of the remaining tokens; or a single one, where weights are unpacked by pieces. The rows of all segments are one pool of
work, so that one token keeps every thread busy on its experts, and a long prompt multiplies the matrices of each expert
by all tokens that chose it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import UNIT_ROWS
from npqwen.kernels.low_rank import ALONE, FIRST, PAIRED, SECOND
from npqwen.kernels.low_rank_experts import (
    EXPERT_DOWN,
    EXPERT_GATE,
    EXPERT_UP,
    add_to_slots,
)
from npqwen.kernels.matmul import CHUNK_BYTES, OVERWRITE, multiply_rows_at, write_rows
from npqwen.kernels.matrix import GROUPS_PER_BLOCK, group_bytes
from npqwen.kernels.packing import PANELS_WIDTH, WIDEST, pack, pack_gated, packed_row_bytes, tile_width, whole_tiles
from npqwen.kernels.paging import PREFETCH_NEVER, prefetch_pages
from npqwen.kernels.pieces import MEMBERS, claim, claim_private, finish_first, is_needed
from npqwen.kernels.prompt_matmul import PROMPT_WIDTH
from npqwen.simd.scalar import exp, multiply_add

EXPERT, SLOT, COUNT, WIDTH = 0, 1, 2, 3
"""Columns of a segment: its expert, its first slot, the number of its tokens, the width of its tiles."""
_PROMPT_TOKENS = PROMPT_WIDTH - PROMPT_WIDTH // 4
"""Fewest tokens of an expert for which padding to a tile for prompts costs less than the narrower tiles."""
MATRICES_AHEAD = 16
"""How many matrices ahead of its use a matrix is prefetched from disk: all those of one token, if it has 8 experts."""


def most_segments(tokens: int, experts: int, chosen: int) -> int:
    """The most segments that this many tokens make."""
    return 2 * min(experts, tokens * chosen)


def most_slots(tokens: int, experts: int, chosen: int) -> int:
    """The most slots that this many tokens take, padding to whole tiles included."""
    return tokens * chosen + min(experts, tokens * chosen) * (max(WIDEST, PROMPT_WIDTH) - 1)


@njit(nogil=True, error_model="numpy")
def route(scores: Any, normalize: bool, experts: Any, weights: Any) -> None:
    """Choose the experts.size distinct experts with the largest softmax(scores): write their numbers and probabilities.

    scores: float32, at least as many as experts, overwritten. Ties go to the first. normalize: divide by the sum of the
    chosen probabilities (config key norm_topk_prob). Scores without a softmax (any NaN or +inf, or nothing but -inf)
    choose the first experts, with weights of NaN, which lead to NaN logits.
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
    for i in range(scores.size):
        scores[i] = exp(scores[i] - row_max)
    total = np.float32(0.0)
    for i in range(scores.size):
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
def arrange(experts: Any, encoding: int, prompt: bool, counts: Any, slots: Any, segments: Any) -> int:
    """Assign a slot to every choice of an expert, those of one expert side by side; return the number of segments.

    experts: int64 (tokens, chosen). encoding: the code of their matrices' encoding. prompt: whether the tokens are
    those of a long part of a prompt; experts with at least _PROMPT_TOKENS of them then use PROMPT_WIDTH. counts:
    scratch, int64 (experts,). slots: like experts. segments: int64 (n, 4).
    """
    counts[:] = 0
    for t in range(experts.shape[0]):
        for n in range(experts.shape[1]):
            counts[experts[t, n]] += 1
    segment_count, slot = 0, 0
    for e in range(counts.size):
        left, first = counts[e], slot
        while left > 0:
            width, count = tile_width(left, encoding, prompt and counts[e] >= _PROMPT_TOKENS), left
            if width <= WIDEST <= left and PANELS_WIDTH == 0:
                width, count = WIDEST, left // WIDEST * WIDEST
            segments[segment_count, EXPERT], segments[segment_count, SLOT] = e, slot
            segments[segment_count, COUNT], segments[segment_count, WIDTH] = count, width
            segment_count += 1
            slot += whole_tiles(count, width)
            left -= count
        counts[e] = first
    for t in range(experts.shape[0]):
        for n in range(experts.shape[1]):
            e = experts[t, n]
            slots[t, n] = counts[e]
            counts[e] += 1
    return segment_count


@njit(nogil=True)
def _slot_bytes(encoding: int, columns: int) -> int:
    """Bytes from one slot to the next, for weights of an encoding (a code): segments differ in the width of tiles."""
    size = packed_row_bytes(encoding, columns, WIDEST)
    return max(size, packed_row_bytes(encoding, columns, PROMPT_WIDTH)) if PROMPT_WIDTH else size


@njit(nogil=True)
def pack_choices(
    team: Any, normed: Any, slots: Any, segments: Any, segment_count: int, encoding: int, packed: Any
) -> None:
    """packed = normed (tokens, cols): each token in all of its slots, and padding; a lone token once, for all slots."""
    size = _slot_bytes(encoding, normed.shape[1])
    tokens = slots.shape[0]
    if tokens == 1:
        while claim(team, 1) == 0:
            pack(normed[0], np.int64(0), np.int64(1), encoding, packed)
        return
    while True:
        t = claim(team, tokens + segment_count)
        if t == tokens + segment_count:
            return
        if t < tokens:
            for n in range(slots.shape[1]):
                s = find_segment(segments, segment_count, slots[t, n])
                first = segments[s, SLOT]
                pack(normed[t], slots[t, n] - first, segments[s, WIDTH], encoding, packed[first * size :])
        else:
            _, first, count, width = segments[t - tokens]
            for lane in range(count, whole_tiles(count, width)):
                pack(normed[0], lane, width, encoding, packed[first * size :])


@njit(nogil=True)
def find_segment(segments: Any, segment_count: int, slot: int) -> int:
    """The segment that a slot is in, by bisection: slots ascend."""
    low, high = 0, segment_count - 1
    while low < high:
        middle = (low + high + 1) // 2
        if segments[middle, SLOT] <= slot:
            low = middle
        else:
            high = middle - 1
    return low


@njit(nogil=True)
def prefetch_matrix(policy: int, layer: Any, segments: Any, segment_count: int, n: int, scratch: Any) -> None:
    """Prefetch the n-th matrix that a layer uses: gate_up_proj of all segments' experts, then down_proj of all.

    policy: PREFETCH_ALWAYS or PREFETCH_IF_ABSENT (npqwen/kernels/paging.py).
    """
    residency = scratch.view(np.uint8)
    s = n % segment_count
    if n >= 2 * segment_count or (s and segments[s, EXPERT] == segments[s - 1, EXPERT]):
        return
    address = layer.gate_up_proj.address + segments[s, EXPERT] * layer.expert_bytes
    down = layer.down_proj.address - layer.gate_up_proj.address
    if n < segment_count:
        prefetch_pages(policy, address, down, residency)
    else:
        prefetch_pages(policy, address + down, layer.expert_bytes - down, residency)


@njit(nogil=True)
def prefetch_first_matrices(
    team: Any, policy: int, layer: Any, segments: Any, segment_count: int, scratch: Any
) -> None:
    """Prefetch the first MATRICES_AHEAD matrices that a layer uses; the others follow as those are used."""
    pieces = 0 if policy == PREFETCH_NEVER else MATRICES_AHEAD
    while True:
        n = claim(team, pieces)
        if n == pieces:
            return
        prefetch_matrix(policy, layer, segments, segment_count, n, scratch)


@njit(nogil=True)
def claim_segment_rows(team: Any, matrix: Any, segment_count: int, multiple: int, most: int) -> Any:
    """The next row groups of a segment's expert for this thread: (segment, first, last).

    segment is `segment_count` when none are left. There are at most `most` groups, unless `multiple` is more, and first
    is a multiple of `multiple`.
    """
    groups = matrix.rows // UNIT_ROWS
    share = segment_count * groups // (8 * team[MEMBERS])
    fitting = CHUNK_BYTES // group_bytes(matrix)
    chunk = max(multiple, min(share, fitting, most, groups) // multiple * multiple)
    chunks = (groups + chunk - 1) // chunk
    task = claim_private(team, segment_count * chunks)
    first = task % chunks * chunk
    return task // chunks, first, min(first + chunk, groups)


@njit(nogil=True)
def project_gated_slots(
    team: Any, kernels: Any, layer: Any, policy: int, segments: Any, segment_count: int, tokens: int, x: Any,
    adapters: Any, kept: Any, local: Any, scratch: Any, gated: Any,
) -> None:  # fmt: skip
    """gated[slot] = silu(gate_proj @ x[slot]) * (up_proj @ x[slot]) of the slot's expert, packed for down_proj.

    kernels: see `matmul_kernels`. layer: a LAYER. policy: for prefetching the next matrices (npqwen/kernels/paging.py).
    x: packed, each segment at its first slot; in a pass of one token, only that token. adapters: an
    `npqwen.engine.records.Adapted`. kept: float32 (slots, columns) that receives the gated rows unpacked, too, or no
    rows. local: this thread's float32 (`local_floats`), for the rows that it computes, and processes further while they
    are in its cache.
    """
    matrix, down = layer.gate_up_proj, layer.down_proj
    size = 0 if tokens == 1 else _slot_bytes(matrix.encoding, matrix.cols)
    gated_size = _slot_bytes(down.encoding, down.cols)
    most = local.size // (whole_tiles(tokens, WIDEST) * UNIT_ROWS)
    while True:
        s, first, last = claim_segment_rows(team, matrix, segment_count, GROUPS_PER_BLOCK, most)
        if s == segment_count:
            return
        if policy != PREFETCH_NEVER and first == 0:
            prefetch_matrix(policy, layer, segments, segment_count, s + MATRICES_AHEAD, scratch)
        expert, slot, count, width = segments[s]
        if not is_needed(team):  # the segments may be those of a later layer
            continue
        address = matrix.address + expert * layer.expert_bytes
        rows = UNIT_ROWS * (last - first)
        # One batch, unless a segment has more tokens than the pass: no data may cause writes past the end of `local`.
        fitting = local.size // rows // width * width
        for start in range(0, whole_tiles(count, width), fitting):
            batch = min(fitting, whole_tiles(count, width) - start)
            x_at = np.int64(x.ctypes.data) + slot * size + start * packed_row_bytes(matrix.encoding, matrix.cols, width)
            multiply_rows_at(kernels, matrix, address, x_at, batch // width, width, first, last, scratch, local)
            real = min(batch, count - start)
            for matrix_of, at in ((EXPERT_GATE, FIRST), (EXPERT_UP, SECOND)):
                add_to_slots(
                    adapters, layer.number, matrix_of, expert, slot + start, real, local, first, last, at, PAIRED,
                    scratch,
                )  # fmt: skip
            if start == 0 and not finish_first(team):
                break
            pack_gated(
                local, matrix, first, last, start, batch, width, down, scratch, gated[slot * gated_size :], kept[slot:]
            )


@njit(nogil=True)
def multiply_slots(
    team: Any, kernels: Any, layer: Any, policy: int, segments: Any, segment_count: int, tokens: int, gated: Any,
    adapters: Any, out: Any, scratch: Any, local: Any,
) -> None:  # fmt: skip
    """out[slot] = down_proj of the slot's expert @ gated[slot], for all segments; out: float32 (slots, >= rows)."""
    matrix = layer.down_proj
    size = _slot_bytes(matrix.encoding, matrix.cols)
    most = local.size // (whole_tiles(tokens, WIDEST) * UNIT_ROWS)
    while True:
        s, first, last = claim_segment_rows(team, matrix, segment_count, 1, most)
        if s == segment_count:
            return
        if policy != PREFETCH_NEVER and first == 0:
            prefetch_matrix(policy, layer, segments, segment_count, segment_count + s + MATRICES_AHEAD, scratch)
        expert, slot, count, width = segments[s]
        if not is_needed(team):  # the segments may be those of a later layer
            continue
        address = matrix.address + expert * layer.expert_bytes
        rows = UNIT_ROWS * (last - first)
        # One batch, as in `project_gated_slots`.
        fitting = local.size // rows // width * width
        for start in range(0, whole_tiles(count, width), fitting):
            batch = min(fitting, whole_tiles(count, width) - start)
            x_at = np.int64(gated.ctypes.data) + slot * size
            x_at += start * packed_row_bytes(matrix.encoding, matrix.cols, width)
            multiply_rows_at(kernels, matrix, address, x_at, batch // width, width, first, last, scratch, local)
            real = min(batch, count - start)
            add_to_slots(
                adapters, layer.number, EXPERT_DOWN, expert, slot + start, real, local, first, last, FIRST, ALONE,
                scratch,
            )  # fmt: skip
            if start == 0 and not finish_first(team):
                break
            write_rows(local, first, last, real, out[slot + start :], OVERWRITE)


@njit(nogil=True, error_model="numpy")
def combine(team: Any, results: Any, slots: Any, weights: Any, hidden: Any) -> None:
    """hidden[t] += sum over n of weights[t, n] * results[slots[t, n]]."""
    while True:
        t = claim(team, slots.shape[0])
        if t == slots.shape[0]:
            return
        line = hidden[t]
        for n in range(slots.shape[1]):
            result, weight = results[slots[t, n]], weights[t, n]
            for i in range(line.size):
                line[i] = multiply_add(weight, result[i], line[i])
