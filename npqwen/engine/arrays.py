"""The arrays that callers give to the engine and get from it: token ids, logits and hidden states, checked."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npqwen.errors import OptionError, OutOfMemoryError
from npqwen.format.encodings import UNIT_ROWS
from npqwen.hardware.machine import available_memory, is_too_little


def ids_array(ids: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    """The ids as an int64 array; OptionError unless all are in the vocabulary."""
    try:
        tokens = np.atleast_1d(ids)
    except ValueError:
        raise OptionError("token ids must be one sequence of whole numbers, not nested sequences") from None
    if not tokens.size:
        raise OptionError("no tokens were given; give at least one")
    if tokens.ndim > 1:
        raise OptionError(f"token ids must be one sequence, not an array of shape {tokens.shape}")
    if tokens.dtype.kind not in "iu":
        raise OptionError(f"token ids must be whole numbers, not {tokens.dtype}; encode text with the tokenizer")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise OptionError(f"token id {wrong} is not in the vocabulary, 0 to {vocab_size - 1}")
    return np.ascontiguousarray(tokens, np.int64)


def logits_array(rows: int, vocab_size: int, chunk: int, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """`out`, checked, or a new array for this many rows of logits.

    out: float32 (rows, vocab_size), or (1, n) with n a multiple of UNIT_ROWS. chunk: see `results_array`. Raises
    OptionError for an `out` of another shape or dtype, OutOfMemoryError.
    """
    shape = rows, vocab_size
    if out is None:
        return results_array(shape, "logits", rows, chunk)
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or not out.flags.writeable:
        raise OptionError(f"out must be a writable float32 array {shape}")
    narrow = out.ndim == 2 and rows == 1 == len(out) and 0 < out.shape[1] < shape[1]
    if out.shape != shape and not (narrow and out.shape[1] % UNIT_ROWS == 0):
        raise OptionError(f"out must be a writable float32 array {shape}")
    return out


def results_array(shape: tuple[int, ...], what: str, tokens: int, chunk: int) -> NDArray[np.float32]:
    """A new float32 array for results of `tokens` tokens, `what` in messages.

    chunk: the most tokens of a pass, whose results also take memory in the engine's buffers. Raises OutOfMemoryError if
    memory cannot hold both.
    """
    size = 4 * math.prod(shape)
    size += size // tokens * min(tokens, chunk)
    available = available_memory() if tokens > chunk else None  # the query takes half a millisecond
    too_large = OutOfMemoryError(
        f"{what} of {tokens} tokens need {size / 1e9:.2f} GB, which is more than the available memory; "
        "request them for fewer tokens at a time"
    )
    if is_too_little(available, size):
        raise too_large
    try:
        return np.empty(shape, np.float32)
    except MemoryError:  # a limit on the address space, or a system that does not overcommit
        raise too_large from None
