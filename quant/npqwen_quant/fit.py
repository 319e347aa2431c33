"""Scales and indices of codebook encodings, each weight rounded to the nearest value."""

from __future__ import annotations

import numpy as np

from npqwen.format.encodings import BLOCK_COLUMNS
from npqwen.format.layout import pad
from npqwen_quant.search import (
    F32,
    I8,
    LANES,
    SMALLEST,
    U8,
    Codebook,
    find_largest,
    interval,
    jit,
    refine,
    round_scale,
    search,
)


@jit
def _gather(rows: F32, factors: F32, first: int, x: F32) -> None:
    """x[c, lane]: the weights of block first + lane, counted over all rows, times the factor of its row."""
    row_blocks = rows.shape[1] // 32
    for lane in range(min(x.shape[1], rows.shape[0] * row_blocks - first)):
        row, start = (first + lane) // row_blocks, (first + lane) % row_blocks * 32
        for c in range(32):
            x[c, lane] = rows[row, start + c] * factors[row]


@jit
def _gather_importance(importance: F32, row_blocks: int, first: int, weights: F32) -> None:
    """weights[c, lane]: the importance of column c of block first + lane, counted over all rows."""
    for lane in range(weights.shape[1]):
        start = (first + lane) % row_blocks * 32
        for c in range(32):
            weights[c, lane] = importance[start + c]


@jit
def _find_scales(
    rows: F32,
    factors: F32,
    importance: F32,
    weighted: bool,
    targets: F32,
    curve: F32,
    rounded: F32,
    scales: F32,
    largest: F32,
) -> None:
    """scales (rows, blocks): the least-squares scales; largest (rows, blocks): the weights of largest magnitude, with
    their signs. Both are multiplied by the rows' factors."""
    flat, flat_largest = scales.reshape(-1), largest.reshape(-1)
    x, weights = np.zeros((32, LANES), np.float32), np.ones((32, LANES), np.float32)
    top, best = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    tried, scale = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for first in range(0, flat.size, LANES):
        _gather(rows, factors, first, x)
        if weighted:
            _gather_importance(importance, scales.shape[1], first, weights)
        find_largest(x, top)
        best[:] = 0
        scale[:] = 0
        for group in targets:
            search(x, weights, weighted, top, group, curve, tried)
            refine(x, weights, rounded, tried, best, scale)
        for lane in range(min(LANES, flat.size - first)):
            flat[first + lane] = scale[lane]
            flat_largest[first + lane] = top[lane]


@jit
def _round_scales(
    rows: F32,
    factors: F32,
    importance: F32,
    weighted: bool,
    rounded: F32,
    nearest: U8,
    scales: F32,
    units: F32,
    neighbours: int,
    errors: F32,
    block_scales: I8,
    indices: U8,
) -> None:
    """Round the scales to multiples of their rows' units, and the weights to the codebook's values at these scales.

    errors (rows): the squared errors of the results so far, infinite at first. Only rows that improve are changed.
    """
    row_blocks = scales.shape[1]
    x, chosen = np.empty((row_blocks, 32), np.float32), np.empty(row_blocks, np.float32)
    for row in range(rows.shape[0]):
        unit, error = units[row], np.float32(0)
        for block in range(row_blocks):
            start = 32 * block
            for c in range(32):
                x[block, c] = rows[row, start + c] * factors[row]
            weights = importance[start:] if weighted else importance
            chosen[block], least = round_scale(
                x[block], weights, weighted, scales[row, block], unit, neighbours, rounded
            )
            error += least
        if error >= errors[row]:
            continue
        errors[row] = error
        for block in range(row_blocks):
            block_scales[row, block] = np.int8(chosen[block])
            size = chosen[block] * unit
            inverse = np.float32(1) / size if size != 0 else np.float32(0)
            for c in range(32):
                indices[row, 32 * block + c] = nearest[interval(x[block, c] * inverse)]


def fit(rows: F32, codebook: F32 | Codebook, importance: F32 | None = None) -> tuple[U8, I8, F32]:
    """The best scales and indices of some rows of a matrix, each row on its own.

    rows: float32 (n, columns), finite. codebook: ascending integers in float32. importance: the weight of each column's
    squared error, float32 (columns), positive; uniform by default.

    Returns indices uint8 (n, columns), block scales int8 (n, columns / 32, rounded up), -127 to 127, and row scales
    float32 (n), zero or normal numbers. Blocks with a scale of 0 have the index of the value nearest to 0.
    """
    book = codebook if isinstance(codebook, Codebook) else Codebook(np.asarray(codebook, np.float32))
    n, columns = rows.shape
    padded = pad_columns(rows)
    factors = row_factors(padded)
    weighted, weights = _weights(importance, padded.shape[1])
    scales, largest = np.empty((2, n, padded.shape[1] // BLOCK_COLUMNS), np.float32)
    tables = book.targets, book.curve, book.rounded
    _find_scales(padded, factors, weights, weighted, *tables, scales, largest)
    block_scales, indices = np.zeros(scales.shape, np.int8), np.zeros(padded.shape, np.uint8)
    row_scales, errors = np.zeros(n, np.float32), np.full(n, np.inf, np.float32)
    # Plain rounding first: it has a smaller error in a few rows, whose plain scales happen to be exact in int8.
    plain = largest / book.values[np.abs(book.values).argmax()]
    for tried, neighbours in ((plain, 0), (scales, 1)):
        units = (np.abs(tried).max(1, initial=0) / np.float32(127)).astype(np.float32)
        units[units / factors < SMALLEST] = 0
        before = errors.copy()
        _round_scales(
            padded,
            factors,
            weights,
            weighted,
            book.rounded,
            book.nearest,
            tried,
            units,
            neighbours,
            errors,
            block_scales,
            indices,
        )
        row_scales = np.where(errors < before, units / factors, row_scales)
    return indices[:, :columns], block_scales, row_scales


def pad_columns(rows: F32) -> F32:
    """The rows, zero-padded to whole blocks, contiguous; not copied if that changes nothing."""
    missing = pad(rows.shape[1], BLOCK_COLUMNS) - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(rows)


def row_factors(rows: F32) -> F32:
    """Powers of two that scale the rows' largest magnitudes to about 1, so that sums neither overflow nor underflow."""
    largest = np.maximum(rows.max(1, initial=0), -rows.min(1, initial=0))
    exponent = np.clip(np.frexp(largest)[1], -120, 126)
    factors: F32 = np.ldexp(np.float32(1), -exponent).astype(np.float32)
    return factors


def _weights(importance: F32 | None, columns: int) -> tuple[bool, F32]:
    """Whether columns differ in importance, and the importance of all columns, padding included."""
    if importance is None:
        return False, np.empty(0, np.float32)
    out = np.ones(columns, np.float32)
    # Relative to the largest, with a lower bound so that a block of unimportant columns still has a best scale.
    out[: importance.size] = np.maximum(importance / max(float(importance.max(initial=0)), SMALLEST), 1e-6)
    return True, out
