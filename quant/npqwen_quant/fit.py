"""Scales and indices of codebook encodings, for the least squared error.

A weight is stored as `row scale * block scale * codebook[index]`: an index of a few bits, an int8 block scale for 32
columns of a row and a float32 row scale. For given indices the best scale follows in closed form, so what is searched
for is the indices: each block's largest weight is scaled to several targets around both ends of the codebook, which
gives the scale's sign too. Then the block scales are rounded to int8, each to the neighbour that leaves the least error
with the indices rounded anew.

Everything works on some blocks at a time, transposed: lane l of an array (32, lanes) is a block, and LLVM vectorizes
over lanes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from npqwen.format.encodings import BLOCK_COLUMNS
from npqwen.format.layout import pad
from npqwen.kernels.compiled import CodeCache

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]

_LANES = 64
"""Blocks at a time: their weights and sums stay in a core's first cache."""

_TABLE = 512
"""Entries of the tables by which a weight in the codebook's unit is rounded: of the intervals [i / 2, i / 2 + 1 / 2)
from -128 on. Midpoints between integers are multiples of 1/2, so that an interval has one nearest value."""

_SPREADS = {8: (0.72, 1.3), 32: (0.8, 1.2), 64: (0.85, 1.08), 256: (0.9, 1.003)}
"""Targets for blocks' largest weights, relative to the codebook's ends, by the codebook's size."""

_SMALLEST = float(np.finfo(np.float32).tiny)
"""Row scales below float32's normal numbers are not used: such rows become zero."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _jit(function: _Function) -> _Function:
    # "nnan" and "ninf" would break comparisons with the NaN that blocks of zeros give.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}
    compiled: Any = njit(**options)(function)
    with contextlib.suppress(RuntimeError):  # no directory for the cache is writable
        compiled._cache = CodeCache(function)
    return cast(_Function, compiled)


@dataclass(frozen=True, eq=False)
class Codebook:
    """A codebook of 2**n ascending int8 values, and what the search needs of it."""

    values: F32

    def __post_init__(self) -> None:
        values = self.values
        integers = np.rint(values)
        if values.ndim != 1 or not 2 <= values.size <= 256 or (np.diff(values) <= 0).any():
            raise ValueError("a codebook needs 2 to 256 ascending values")
        if (integers != values).any() or values[0] < -128 or values[-1] > 127:
            raise ValueError("a codebook's values are int8")

    @cached_property
    def nearest(self) -> U8:
        """The index of the nearest value, by the intervals of _TABLE."""
        midpoints = (self.values[1:] + self.values[:-1]) / 2
        return np.searchsorted(midpoints, np.arange(_TABLE) / 2 - 127.75).astype(np.uint8)

    @cached_property
    def rounded(self) -> F32:
        """The nearest value, by the intervals of _TABLE."""
        return self.values[self.nearest]

    @cached_property
    def curve(self) -> F32:
        """Polynomials that approximate the codebook, which round much faster than a table: see _search.

        Centre m of the indices and of the values z; coefficients a, b of y = (x - z) * (a + b * |x - z|), near the
        index less m for a value x; and p0 to p3 of the value p(i) of index m + i.
        """
        count = self.values.size
        middle = (count - 1) / 2
        index = np.arange(count) - middle
        forward = np.polynomial.polynomial.polyfit(index, self.values, 3) if count > 4 else np.zeros(4)
        if count <= 4:
            forward[:2] = np.polynomial.polynomial.polyfit(index, self.values, 1)
        # Between two values the index is decided: fitted there.
        x, y = (self.values[1:] + self.values[:-1]) / 2, (index[1:] + index[:-1]) / 2
        centre = np.interp(0, y, x) if count > 2 else x[0]
        x = x - centre
        backward = np.linalg.lstsq(np.stack([x, x * np.abs(x)], 1), y, rcond=None)[0]
        return np.array([middle, centre, *backward, *forward], np.float32)

    @cached_property
    def targets(self) -> F32:
        """Groups of values that a block's largest weight is scaled to, one for each candidate.

        Beyond the codebook it is clipped, from which a block with few large weights gains; the more so, the fewer the
        values. The best of each group is tried with exact rounding.
        """
        low, high = next(spread for count, spread in _SPREADS.items() if self.values.size <= count)
        return (self.values[[0, -1], None] * np.linspace(low, high, 12)).reshape(4, -1).astype(np.float32)


@_jit
def _gather(rows: F32, factors: F32, first: int, x: F32) -> None:
    """x[c, lane]: the weights of block first + lane, counted over all rows, times the factor of its row."""
    row_blocks = rows.shape[1] // 32
    for lane in range(min(x.shape[1], rows.shape[0] * row_blocks - first)):
        row, start = (first + lane) // row_blocks, (first + lane) % row_blocks * 32
        for c in range(32):
            x[c, lane] = rows[row, start + c] * factors[row]


@_jit
def _gather_importance(importance: F32, row_blocks: int, first: int, weights: F32) -> None:
    """weights[c, lane]: the importance of column c of block first + lane, counted over all rows."""
    for lane in range(weights.shape[1]):
        start = (first + lane) % row_blocks * 32
        for c in range(32):
            weights[c, lane] = importance[start + c]


@_jit
def _find_largest(x: F32, largest: F32) -> None:
    """largest[lane]: the weight of largest magnitude, with its sign."""
    largest[:] = 0
    for c in range(32):
        for lane in range(x.shape[1]):
            larger = abs(x[c, lane]) > abs(largest[lane])
            largest[lane] = x[c, lane] if larger else largest[lane]


@_jit
def _search(x: F32, weights: F32, weighted: bool, largest: F32, targets: F32, curve: F32, scale: F32) -> None:
    """scale[lane]: the least-squares scale for the codebook's values at the best target, about.

    Values v want the scale (x·v)/(v·v), which leaves of the squared error x·x all but (x·v)²/(v·v). They are
    approximated by the curve.
    """
    lanes = x.shape[1]
    inverse, best = np.empty(lanes, np.float32), np.zeros(lanes, np.float32)
    xv, vv = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    half, centre, a, b = curve[0], curve[1], curve[2], curve[3]
    p0, p1, p2, p3 = curve[4], curve[5], curve[6], curve[7]
    fraction = half - np.floor(half)  # indices are integers from the first on, so half-integers from the middle on
    scale[:] = 0
    for target in targets:
        xv[:] = 0
        vv[:] = 0
        for lane in range(lanes):
            # Rows are scaled to about 1: such blocks are zero at any int8 scale, and the quotient could overflow.
            tiny = abs(largest[lane]) < np.float32(2.0**-40)
            inverse[lane] = np.float32(0) if tiny else target / largest[lane]
        for c in range(0, 32, 4):  # four columns at a time, for fewer loads and stores of the sums
            for lane in range(lanes):
                for k in range(4):
                    w = x[c + k, lane]
                    y = w * inverse[lane] - centre
                    y = min(max(y * (a + b * abs(y)), -half), half)
                    i = np.rint(y - fraction) + fraction
                    v = p0 + i * (p1 + i * (p2 + i * p3))
                    u = weights[c + k, lane] * v if weighted else v
                    xv[lane] += w * u
                    vv[lane] += v * u
        for lane in range(lanes):
            # NaN where all weights are zero, and so never better.
            step = xv[lane] / vv[lane]
            gain = xv[lane] * step
            better = gain > best[lane]
            scale[lane] = step if better else scale[lane]
            best[lane] = gain if better else best[lane]


@_jit
def _interval(x: Any) -> Any:
    """The entry of the tables for a weight in the codebook's unit."""
    return np.int32(min(max(x + x + np.float32(256), np.float32(0)), np.float32(511)))


@_jit
def _refine(x: F32, weights: F32, rounded: F32, tried: F32, best: F32, scale: F32) -> None:
    """Where the codebook's values nearest at the scale `tried` are better than the best so far, take their scale."""
    for lane in range(x.shape[1]):
        inverse = np.float32(1) / tried[lane] if tried[lane] != 0 else np.float32(0)
        xv = vv = np.float32(0)
        for c in range(32):
            v = rounded[_interval(x[c, lane] * inverse)]
            u = weights[c, lane] * v
            xv += x[c, lane] * u
            vv += v * u
        if tried[lane] != 0 and vv > 0 and xv * xv / vv > best[lane]:
            best[lane] = xv * xv / vv
            scale[lane] = xv / vv


@_jit
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
    their signs. Both times the rows' factors."""
    flat, flat_largest = scales.reshape(-1), largest.reshape(-1)
    x, weights = np.zeros((32, _LANES), np.float32), np.ones((32, _LANES), np.float32)
    top, best = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    tried, scale = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for first in range(0, flat.size, _LANES):
        _gather(rows, factors, first, x)
        if weighted:
            _gather_importance(importance, scales.shape[1], first, weights)
        _find_largest(x, top)
        best[:] = 0
        scale[:] = 0
        for group in targets:
            _search(x, weights, weighted, top, group, curve, tried)
            _refine(x, weights, rounded, tried, best, scale)
        for lane in range(min(_LANES, flat.size - first)):
            flat[first + lane] = scale[lane]
            flat_largest[first + lane] = top[lane]


@_jit
def _round_scale(
    x: F32, importance: F32, weighted: bool, scale: Any, unit: Any, neighbours: int, rounded: F32
) -> tuple[Any, Any]:
    """The multiple of the unit near the scale that leaves the least squared error of a block, and that error."""
    middle = np.rint(scale / unit) if unit > 0 else np.float32(0)
    least, chosen = np.float32(np.inf), np.float32(0)
    for step in range(-neighbours, neighbours + 1):
        tried = min(max(middle + np.float32(step), np.float32(-127)), np.float32(127))
        size = tried * unit
        inverse = np.float32(1) / size if size != 0 else np.float32(0)
        error = np.float32(0)
        for c in range(32):
            e = x[c] - size * rounded[_interval(x[c] * inverse)]
            error += e * e * importance[c] if weighted else e * e
        chosen = tried if error < least else chosen
        least = error if error < least else least
    return chosen, least


@_jit
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
    """Round the scales to multiples of their rows' units, and the weights to the codebook's values at those.

    errors (rows): the squared errors of the results so far, infinite at first. Only rows that get better are changed.
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
            chosen[block], least = _round_scale(
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
                indices[row, 32 * block + c] = nearest[_interval(x[block, c] * inverse)]


def fit(rows: F32, codebook: F32 | Codebook, importance: F32 | None = None) -> tuple[U8, I8, F32]:
    """The best scales and indices of some rows of a matrix, each row by itself.

    rows: float32 (n, columns), finite. codebook: ascending integers in float32. importance: what each column's squared
    error is multiplied with, float32 (columns), positive; all alike by default.

    Returns indices uint8 (n, columns), block scales int8 (n, columns / 32, rounded up), -127 to 127, and row scales
    float32 (n), zero or normal numbers. Blocks with a scale of 0 have the index of the value nearest to 0.
    """
    book = codebook if isinstance(codebook, Codebook) else Codebook(np.asarray(codebook, np.float32))
    n, columns = rows.shape
    padded = _pad_columns(rows)
    factors = _row_factors(padded)
    weighted, weights = _weights(importance, padded.shape[1])
    scales, largest = np.empty((2, n, padded.shape[1] // BLOCK_COLUMNS), np.float32)
    search = book.targets, book.curve, book.rounded
    _find_scales(padded, factors, weights, weighted, *search, scales, largest)
    block_scales, indices = np.zeros(scales.shape, np.int8), np.zeros(padded.shape, np.uint8)
    row_scales, errors = np.zeros(n, np.float32), np.full(n, np.inf, np.float32)
    # Plain rounding first, which leaves less in a few odd rows: where it happens to meet int8 scales.
    plain = largest / book.values[np.abs(book.values).argmax()]
    for tried, neighbours in ((plain, 0), (scales, 1)):
        units = (np.abs(tried).max(1, initial=0) / np.float32(127)).astype(np.float32)
        units[units / factors < _SMALLEST] = 0
        before = errors.copy()
        tables = book.rounded, book.nearest
        _round_scales(
            padded, factors, weights, weighted, *tables, tried, units, neighbours, errors, block_scales, indices
        )
        row_scales = np.where(errors < before, units / factors, row_scales)
    return indices[:, :columns], block_scales, row_scales


def _pad_columns(rows: F32) -> F32:
    """The rows with zeros up to whole blocks; themselves if none are needed."""
    missing = pad(rows.shape[1], BLOCK_COLUMNS) - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(rows)


def _row_factors(rows: F32) -> F32:
    """Powers of two that bring the rows' largest magnitudes to about 1, for sums that neither overflow nor vanish."""
    largest = np.maximum(rows.max(1, initial=0), -rows.min(1, initial=0))
    exponent = np.clip(np.frexp(largest)[1], -120, 126)
    factors: F32 = np.ldexp(np.float32(1), -exponent).astype(np.float32)
    return factors


def _weights(importance: F32 | None, columns: int) -> tuple[bool, F32]:
    """Whether columns differ in importance, and the importance of all columns, padding included."""
    if importance is None:
        return False, np.empty(0, np.float32)
    out = np.ones(columns, np.float32)
    # Relative to the largest, and never so little that a block of unimportant columns has no best scale.
    out[: importance.size] = np.maximum(importance / max(float(importance.max(initial=0)), _SMALLEST), 1e-6)
    return True, out
