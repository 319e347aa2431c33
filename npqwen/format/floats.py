"""The floats of checkpoints as NumPy arrays. NumPy lacks bf16, whose bits are held as uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
"""Of each safetensors dtype of floats that can be read, the NumPy dtype to read it as."""

_INFINITY = 0x7F800000
"""The bits of float32's infinity: those of a NaN's magnitude are greater, those of any finite number smaller."""


def widen(stored: NDArray[Any]) -> NDArray[np.float32]:
    """float32 of float16, float32 or the bits of bf16 (uint16), exactly; an array of float32 is returned itself."""
    if stored.dtype == np.uint16:
        wide = stored.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return stored.astype(np.float32, copy=False)


def narrow(stored: NDArray[Any]) -> NDArray[np.uint16]:
    """The bits of bf16: returned as they are, or rounded to nearest, ties to even, from float16 or float32.

    Values beyond the range of bf16 become infinity.
    """
    if stored.dtype == np.uint16:
        return stored
    values = stored.astype(np.float32, copy=False).view(np.uint32)
    rounded = (values + 0x7FFF + ((values >> 16) & 1)) >> 16
    # Rounding could carry from a NaN's mantissa beyond its exponent.
    rounded[(values & 0x7FFFFFFF) > _INFINITY] = 0x7FC0
    return rounded.astype(np.uint16)
