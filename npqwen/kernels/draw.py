"""Drawing one of a few candidates, the last step of sampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, error_model="numpy")
def draw(
    logits: Any, ids: Any, weights: Any, temperature: float, top_p: float, min_p: float, total: float, number: float
) -> int:
    """One of `ids` after top-p and min-p; -1 if the greatest of their logits is not finite.

    logits: float32, of all tokens. ids: int64, ascending, at least one; reordered in place, likeliest first. weights:
    scratch, float64 (ids,). total: the sum of the weights exp((logit - maximum) / temperature) of all tokens; negative
    if only `ids` count. number: random, at least 0 and less than 1.
    """
    top = -np.inf
    for id in ids:
        if not logits[id] <= top:
            top = np.float64(logits[id])
            if math.isnan(top):
                break
    if not math.isfinite(top):
        return -1
    for n in range(ids.size):
        id, at = ids[n], n
        weight = math.exp((np.float64(logits[id]) - top) / temperature)
        while at > 0 and weights[at - 1] < weight:
            ids[at], weights[at] = ids[at - 1], weights[at - 1]
            at -= 1
        ids[at], weights[at] = id, weight
    count = ids.size
    if top_p < 1:
        needed, mass = top_p * (weights.sum() if total < 0 else total), 0.0
        for n in range(ids.size):
            mass += weights[n]
            if mass >= needed:
                count = n + 1
                break
    while weights[count - 1] < min_p:
        count -= 1
    left = number * weights[:count].sum()
    for n in range(count):
        left -= weights[n]
        if left < 0:
            return int(ids[n])
    return int(ids[0])  # rounding made the last weight's share empty
