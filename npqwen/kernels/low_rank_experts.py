"""Low-rank adapters of experts, slot by slot (npqwen/kernels/experts.py): a slot holds one token of one expert."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import UNIT_ROWS
from npqwen.kernels.low_rank import expand, shrink_tile
from npqwen.kernels.pieces import claim

EXPERT_INPUT, EXPERT_GATED = map(np.int64, range(2))
"""Inputs of an expert's adapted matrices."""
EXPERT_GATE, EXPERT_UP, EXPERT_DOWN = map(np.int64, range(3))
"""An expert's adapted matrices."""


@njit(nogil=True)
def gated_rows_read(adapters: Any, layer: int) -> Any:
    """The array from which adapters of this pass read the gated rows of a layer's experts, float32 (slots, columns);
    without rows if none reads them."""
    rows = adapters.slot_gated
    return rows if adapters.tiles.shape[0] and adapters.expert_most_groups[layer, EXPERT_GATED] else rows[:0]


@njit(nogil=True)
def shrink_slots(team: Any, adapters: Any, layer: int, what: int, chosen: Any, slots: Any, x: Any) -> None:
    """adapters.slot_reduced = A @ x for the matrices of each slot's expert that read `what` (EXPERT_INPUT, ...).

    chosen, slots: int64 (tokens, experts per token). x: float32, a row for each token if `what` is EXPERT_INPUT, else
    one for each slot.
    """
    if adapters.tiles.shape[0] == 0 or (adapters.expert_most_groups[layer] == 0).all():
        return
    reduced, several = adapters.slot_reduced, chosen.shape[1]
    while True:
        choice = claim(team, chosen.size)
        if choice == chosen.size:
            return
        token, n = choice // several, choice % several
        adapter, expert, slot = adapters.token_adapters[token], chosen[token, n], slots[token, n]
        if what == EXPERT_INPUT:
            adapters.slot_adapters[slot] = adapter
        if adapter < 0:
            continue
        groups = adapters.expert_shrinks[adapter, layer, expert, what, 1]
        if groups:
            row = token if what == EXPERT_INPUT else slot
            address = adapters.expert_shrinks[adapter, layer, expert, what, 0]
            shrink_tile(adapters.kernels, address, groups, x.shape[1], 1, 0, 1, x[row : row + 1], reduced[slot:])


@njit(nogil=True)
def add_to_slots(
    adapters: Any, layer: int, matrix: int, expert: int, slot: int, count: int, local: Any, first: int, last: int,
    start: int, stride: int, scratch: Any,
) -> None:  # fmt: skip
    """Add the adapters' products for an expert's matrix (EXPERT_GATE, ...) to the results of `count` slots starting at
    `slot`.

    local: float32, flat, count * 16 * (last - first): row groups first to last - 1 of the stored matrix; the adapted
    one's are start, start + stride, ... scratch: this thread's float32, at least the largest rank.
    """
    what = EXPERT_GATED if matrix == EXPERT_DOWN else EXPERT_INPUT
    if adapters.tiles.shape[0] == 0 or adapters.expert_most_groups[layer, what] == 0:
        return
    begin, end = (first - start + stride - 1) // stride, (last - start + stride - 1) // stride
    row = UNIT_ROWS * (last - first)
    for i in range(count):
        adapter = adapters.slot_adapters[slot + i]
        if adapter < 0 or begin >= end:
            continue
        address = adapters.expert_expands[adapter, layer, expert, matrix, 0]
        rank = adapters.expert_expands[adapter, layer, expert, matrix, 1]
        if rank:
            place = i * row + UNIT_ROWS * (start + begin * stride - first)
            expand(
                adapters.kernels, address + 2 * begin * rank * UNIT_ROWS, rank,
                adapters.expert_expands[adapter, layer, expert, matrix, 2], end - begin, 1, 1,
                adapters.slot_reduced[slot + i :], local[place:], row, UNIT_ROWS * stride, scratch,
            )  # fmt: skip
