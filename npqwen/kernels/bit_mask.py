"""The logits of the tokens that a constraint allows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, error_model="numpy")
def mask(values: Any, bits: Any, out: Any) -> Any:
    """out = the values whose bit is set, minus infinity for the others; returns how many are set.

    values, out: float32, of the same size, possibly the same array. bits: uint32, at least one for each value: that of
    value i is bit i % 32 of word i // 32.
    """
    count: Any = 0
    whole = values.size // 32
    for n in range(whole):
        word = bits[n]
        at = 32 * n
        if word == np.uint32(0):
            for i in range(32):
                out[at + i] = -np.inf
        elif word == np.uint32(0xFFFFFFFF):
            for i in range(32):
                out[at + i] = values[at + i]
            count += 32
        else:
            for i in range(32):
                allowed = (word >> np.uint32(i)) & np.uint32(1)
                out[at + i] = values[at + i] if allowed else np.float32(-np.inf)
                count += np.int64(allowed)
    for i in range(32 * whole, values.size):
        allowed = (bits[i // 32] >> np.uint32(i % 32)) & np.uint32(1)
        out[i] = values[i] if allowed else np.float32(-np.inf)
        count += np.int64(allowed)
    return count
