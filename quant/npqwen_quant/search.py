"""The search for scales of codebook encodings, for the least squared error.

A weight is stored as `row scale * block scale * codebook[index]`: an index of a few bits, an int8 block scale for 32
columns of a row and a float32 row scale. For given indices the best scale has a closed form, so the search is for the
indices: each block's largest weight is scaled to several targets around both ends of the codebook, which also
determines the scale's sign. Then the block scales are rounded to int8, each to the neighbour with the least error after
rounding the indices again.

All functions process several blocks at a time, transposed: lane l of an array (32, lanes) is a block, and LLVM
vectorizes over lanes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from npqwen.kernels.compiled import CodeCache

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]

LANES = 64
"""Blocks processed at a time: their weights and sums stay in a core's L1 cache."""

_TABLE = 512
"""Entries of the rounding tables for weights in the codebook's unit: one for each interval [i / 2, i / 2 + 1 / 2),
starting at -128. Midpoints between integers are multiples of 1/2, so that an interval has one nearest value."""

_SPREADS = {8: (0.72, 1.3), 32: (0.8, 1.2), 64: (0.85, 1.08), 256: (0.9, 1.003)}
"""Targets for blocks' largest weights, relative to the codebook's ends, by the codebook's size."""

SMALLEST = float(np.finfo(np.float32).tiny)
"""The smallest row scale that is used: rows that need a subnormal scale become zero."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


class _Cache(CodeCache):
    """Machine code on disk, invalidated by a change of any module of this package: functions call other modules'."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = self._impl.locator.get_source_stamp(), _DIGEST


def jit(function: _Function) -> _Function:
    """Compile a function when it is first called, or load its machine code from disk."""
    # "nnan" and "ninf" would break comparisons with the NaN that blocks of zeros produce.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}
    compiled: Any = njit(**options)(function)
    with contextlib.suppress(RuntimeError):  # no directory for the cache is writable
        compiled._cache = _Cache(function)
    return cast(_Function, compiled)


@dataclass(frozen=True, eq=False)
class Codebook:
    """A codebook of 2**n ascending int8 values, and the tables that the search derives from it."""

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
        """For each interval of _TABLE, the index of the nearest value: uint8 (_TABLE,)."""
        midpoints = (self.values[1:] + self.values[:-1]) / 2
        return np.searchsorted(midpoints, np.arange(_TABLE) / 2 - 127.75).astype(np.uint8)

    @cached_property
    def rounded(self) -> F32:
        """For each interval of _TABLE, the nearest value: float32 (_TABLE,)."""
        return self.values[self.nearest]

    @cached_property
    def curve(self) -> F32:
        """Polynomials that approximate the codebook; rounding with them is much faster than with a table: see search.

        The centres m of the indices and z of the values; coefficients a, b of y = (x - z) * (a + b * |x - z|), which
        approximates (index - m) for a value x; and p0 to p3 of p(i), which approximates the value of index m + i.
        """
        count = self.values.size
        middle = (count - 1) / 2
        index = np.arange(count) - middle
        forward = np.polynomial.polynomial.polyfit(index, self.values, 3) if count > 4 else np.zeros(4)
        if count <= 4:
            forward[:2] = np.polynomial.polynomial.polyfit(index, self.values, 1)
        # Fitted at the midpoints between values, where the rounded index changes.
        x, y = (self.values[1:] + self.values[:-1]) / 2, (index[1:] + index[:-1]) / 2
        centre = np.interp(0, y, x) if count > 2 else x[0]
        x = x - centre
        backward = np.linalg.lstsq(np.stack([x, x * np.abs(x)], 1), y, rcond=None)[0]
        return np.array([middle, centre, *backward, *forward], np.float32)

    @cached_property
    def targets(self) -> F32:
        """Values that a block's largest weight is scaled to, one for each candidate: float32 (4 groups, 6).

        Targets beyond the codebook's ends clip it, which helps blocks with few large weights; the more so, the smaller
        the codebook. The best of each group is tried with exact rounding.
        """
        low, high = next(spread for count, spread in _SPREADS.items() if self.values.size <= count)
        return (self.values[[0, -1], None] * np.linspace(low, high, 12)).reshape(4, -1).astype(np.float32)


@jit
def find_largest(x: F32, largest: F32) -> None:
    """largest[lane]: the weight of largest magnitude, with its sign."""
    largest[:] = 0
    for c in range(32):
        for lane in range(x.shape[1]):
            larger = abs(x[c, lane]) > abs(largest[lane])
            largest[lane] = x[c, lane] if larger else largest[lane]


@jit
def search(x: F32, weights: F32, weighted: bool, largest: F32, targets: F32, curve: F32, scale: F32) -> None:
    """scale[lane]: approximately the least-squares scale for the codebook's values at the best target.

    For values v, the best scale is (x·v)/(v·v), which reduces the squared error x·x by (x·v)²/(v·v). The values are
    approximated by the curve.
    """
    lanes = x.shape[1]
    inverse, best = np.empty(lanes, np.float32), np.zeros(lanes, np.float32)
    xv, vv = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    half, centre, a, b = curve[0], curve[1], curve[2], curve[3]
    p0, p1, p2, p3 = curve[4], curve[5], curve[6], curve[7]
    fraction = half - np.floor(half)  # indices are integers, and half-integers when counted from the middle
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


@jit
def interval(x: Any) -> Any:
    """The entry of the tables for a weight in the codebook's unit."""
    return np.int32(min(max(x + x + np.float32(256), np.float32(0)), np.float32(511)))


@jit
def refine(x: F32, weights: F32, rounded: F32, tried: F32, best: F32, scale: F32) -> None:
    """Where rounding at the scale `tried` gives better values than the best so far, take their least-squares scale."""
    for lane in range(x.shape[1]):
        inverse = np.float32(1) / tried[lane] if tried[lane] != 0 else np.float32(0)
        xv = vv = np.float32(0)
        for c in range(32):
            v = rounded[interval(x[c, lane] * inverse)]
            u = weights[c, lane] * v
            xv += x[c, lane] * u
            vv += v * u
        if tried[lane] != 0 and vv > 0 and xv * xv / vv > best[lane]:
            best[lane] = xv * xv / vv
            scale[lane] = xv / vv


@jit
def round_scale(
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
            e = x[c] - size * rounded[interval(x[c] * inverse)]
            error += e * e * importance[c] if weighted else e * e
        chosen = tried if error < least else chosen
        least = error if error < least else least
    return chosen, least
