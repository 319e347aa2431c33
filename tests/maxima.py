"""What models without an engine give beside logits: the greatest of each block of them, by NumPy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from npqwen.kernels.greatest import MAXIMA_BLOCK


def write_maxima(logits: Iterable[NDArray[np.float32]], maxima: NDArray[np.float32] | None) -> None:
    """Write those of each row of all arrays, one after the other, unless maxima is None."""
    if maxima is not None:
        for row, target in zip((row for rows in logits for row in rows), maxima, strict=False):
            count = len(row) // MAXIMA_BLOCK
            target[:count] = row[: count * MAXIMA_BLOCK].reshape(count, MAXIMA_BLOCK).max(axis=1)
