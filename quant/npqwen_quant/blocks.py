"""Blocks of weights: 32 of a row's columns share one f16 scale, chosen for the least squared error.

Everything works on blocks of 16 rows at a time, transposed: lane r of every loop over 16 is row r. LLVM vectorizes over
rows, and the file has that order (FORMAT.md, "Units"). Units are written as u32 words, four little-endian bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from npqwen.format.encodings import INT4, INT8, UNIT_COLUMNS, UNIT_ROWS, Encoding
from npqwen.format.layout import ceil_div
from npqwen.kernels.compiled import CodeCache

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]
I32 = npt.NDArray[np.int32]

LANES = 128
"""Blocks at a time: 16 rows of four units, which fill vectors of any width."""

INFINITY = 0x7F800000
"""The bits of float32's infinity: those of a NaN's magnitude are greater, those of any finite number smaller."""

_NIBBLES, _BYTES = 0, 1
"""How a block's integers are stored: two a byte plus 8, or one a byte."""


@dataclass(frozen=True, eq=False)
class Quantizer:
    """How an integer encoding's scales are searched for, and its integers stored."""

    targets: F32
    """What a block's largest weight is scaled to before rounding, in each candidate. Beyond the range of the integers
    it is clipped, from which a block with few large weights gains."""
    storage: int
    """_NIBBLES or _BYTES."""


# The squared error is 0.01 % (int8: 4 %) above what the best of all f16 scales leaves. The range of int4, -8..7, is not
# symmetric, so both signs of its scale are worth trying.
QUANTIZERS = {
    INT4: Quantizer(np.concatenate([-np.linspace(6.6, 9.5, 16), np.linspace(5.8, 8.6, 16)]).astype("f4"), _NIBBLES),
    INT8: Quantizer(np.linspace(112, 127.4, 16).astype("f4"), _BYTES),
}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _jit(function: _Function) -> _Function:
    # Rounding to f16 by integers forbids "reassoc"; "nnan" and "ninf" would break the search for both.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
    compiled: Any = njit(**options)(function)
    with contextlib.suppress(RuntimeError):  # no directory for the cache is writable
        compiled._cache = CodeCache(function)
    return cast(_Function, compiled)


@_jit
def _gather(rows: F32, first: int, column: int, x: F32) -> None:
    """Fill x[c, lane] from row `first` and column `column` on, with zeros beyond the matrix."""
    row_count, column_count = rows.shape
    for lane in range(x.shape[1]):
        row = first + lane % 16
        start = column + lane // 16 * 32
        if row < row_count and start + 32 <= column_count:
            for c in range(32):
                x[c, lane] = rows[row, start + c]
        else:
            for c in range(32):
                inside = row < row_count and start + c < column_count
                x[c, lane] = rows[row, start + c] if inside else np.float32(0)


@_jit
def _find_largest(x: F32, largest: F32) -> int:
    """largest[lane]: the weight of largest magnitude, with its sign. Returns the bits of the largest of all."""
    bits = x.view(np.int32)
    largest_bits = largest.view(np.int32)
    largest_bits[:] = 0
    for c in range(32):
        for lane in range(x.shape[1]):
            larger = (bits[c, lane] & np.int32(0x7FFFFFFF)) > (largest_bits[lane] & np.int32(0x7FFFFFFF))
            largest_bits[lane] = bits[c, lane] if larger else largest_bits[lane]
    top = 0
    for lane in range(x.shape[1]):
        top = max(top, int(largest_bits[lane] & np.int32(0x7FFFFFFF)))
    return top


@_jit
def _search(x: F32, targets: F32, low: Any, high: Any, largest: F32, scale: F32) -> None:
    """scale[lane]: the least-squares scale for the integers of the best target.

    Integers q want the scale (w·q)/(q·q), which leaves of the squared error w·w all but (w·q)²/(q·q).
    """
    lanes = x.shape[1]
    inverse = np.empty(lanes, np.float32)
    wq = np.empty(lanes, np.float32)
    qq = np.empty(lanes, np.float32)
    best = np.zeros(lanes, np.float32)
    scale[:] = 0
    for target in targets:
        wq[:] = 0
        qq[:] = 0
        for lane in range(lanes):
            # Weights this small are zero at any f16 scale, and the quotient could overflow.
            tiny = abs(largest[lane]) < np.float32(2.0**-30)
            inverse[lane] = np.float32(0) if tiny else target / largest[lane]
        for c in range(0, 32, 4):  # four columns at a time, for fewer loads and stores of the sums
            for lane in range(lanes):
                for k in range(4):
                    w = x[c + k, lane]
                    q = min(max(np.rint(w * inverse[lane]), low), high)
                    wq[lane] += w * q
                    qq[lane] += q * q
        for lane in range(lanes):
            # NaN where all weights are zero, and so never better.
            step = wq[lane] / qq[lane]
            gain = wq[lane] * step
            better = gain > best[lane]
            scale[lane] = step if better else scale[lane]
            best[lane] = gain if better else best[lane]


@_jit
def _to_f16(x: F32, half: I32) -> None:
    """The bits of the f16 nearest to each magnitude, ties to even, 65504 at most."""
    bits = x.view(np.int32)
    for lane in range(x.size):
        a = bits[lane] & np.int32(0x7FFFFFFF)
        n = a - np.int32(112 << 23)
        normal = (n + np.int32(0xFFF) + ((n >> np.int32(13)) & np.int32(1))) >> np.int32(13)
        # Below 2^-14 f16's spacing is 2^-24.
        subnormal = np.int32(np.rint(min(abs(x[lane]), np.float32(1)) * np.float32(2.0**24)))
        half[lane] = min(subnormal if a < np.int32(0x38800000) else normal, np.int32(0x7BFF))


@_jit
def _from_f16(half: I32, x: F32, inverse: F32) -> None:
    """x: finite f16, given by their bits, as float32. inverse: 1 / x, or 0 for 0."""
    bits = x.view(np.int32)
    for lane in range(x.size):
        magnitude = half[lane] & np.int32(0x7FFF)
        bits[lane] = (magnitude << np.int32(13)) + np.int32(112 << 23)
    for lane in range(x.size):
        magnitude = half[lane] & np.int32(0x7FFF)
        size = np.float32(magnitude) * np.float32(2.0**-24) if magnitude < np.int32(0x400) else x[lane]
        x[lane] = -size if half[lane] & np.int32(0x8000) else size
        inverse[lane] = np.float32(1) / x[lane] if magnitude > 0 else np.float32(0)


@_jit
def _fit(x: F32, targets: F32, low: Any, high: Any, half: I32, q: I32) -> int:
    """Choose the scale and the integers of each lane's block.

    x: weights (32, lanes). Filled are half, the bits of the f16 scales (lanes), and q, integers from low to high
    (32, lanes). Returns the bits of the largest magnitude.
    """
    lanes = x.shape[1]
    largest = np.empty(lanes, np.float32)
    scale = np.empty(lanes, np.float32)
    top = _find_largest(x, largest)
    _search(x, targets, low, high, largest, scale)
    nearest = np.empty(lanes, np.int32)
    _to_f16(scale, nearest)
    negative = np.empty(lanes, np.int32)
    for lane in range(lanes):
        negative[lane] = np.int32(0x8000) if scale[lane] < 0 else np.int32(0)
    tried = np.empty(lanes, np.int32)
    inverse = np.empty(lanes, np.float32)
    error = np.empty(lanes, np.float32)
    least = np.empty(lanes, np.float32)
    least[:] = np.inf
    # The scale rounded to f16 rounds the weights differently: measure its neighbours too.
    for step in (0, -1, 1):
        for lane in range(lanes):
            magnitude = min(max(nearest[lane] + np.int32(step), np.int32(0)), np.int32(0x7BFF))
            tried[lane] = magnitude | negative[lane] if magnitude > 0 else np.int32(0)
        _from_f16(tried, scale, inverse)
        error[:] = 0
        for c in range(32):
            for lane in range(lanes):
                w = x[c, lane]
                e = w - scale[lane] * min(max(np.rint(w * inverse[lane]), low), high)
                error[lane] += e * e
        for lane in range(lanes):
            better = error[lane] < least[lane]
            least[lane] = error[lane] if better else least[lane]
            half[lane] = tried[lane] if better else half[lane]
    _from_f16(half, scale, inverse)
    for c in range(32):
        for lane in range(lanes):
            q[c, lane] = np.int32(min(max(np.rint(x[c, lane] * inverse[lane]), low), high))
    return top


@_jit
def _store_scales(half: I32, words: U32) -> None:
    """Write one unit's 32 scales."""
    for i in range(16):
        words[i] = np.uint32(half[2 * i]) | np.uint32(half[2 * i + 1]) << np.uint32(16)


@_jit
def _store_nibbles(q: I32, lane: int, unit: U32, word: int) -> None:
    """Write the block q[:, lane : lane + 16] to unit[word:], as int4 stores it."""
    for j in range(4):
        for r in range(16):
            packed = 0
            for k in range(4):
                low, high = q[4 * j + k, lane + r] + 8, q[16 + 4 * j + k, lane + r] + 8
                packed |= (low | high << 4) << 8 * k
            unit[word + 16 * j + r] = packed


@_jit
def _store_bytes(q: I32, lane: int, unit: U32, word: int) -> None:
    """Write the block q[:, lane : lane + 16] to unit[word:], as int8 stores it."""
    for j in range(8):
        for r in range(16):
            packed = 0
            for k in range(4):
                packed |= (q[4 * j + k, lane + r] & 255) << 8 * k
            unit[word + 16 * j + r] = packed


@_jit
def _quantize(
    rows: F32,
    out: U32,
    start: int,
    stride: int,
    scale_words: int,
    block_words: int,
    storage: int,
    low: Any,
    high: Any,
    targets: F32,
) -> int:
    """`quantize` for units of words; low and high are float32. Returns the bits of the largest magnitude."""
    x = np.empty((32, LANES), np.float32)
    q = np.empty((32, LANES), np.int32)
    half = np.empty(LANES, np.int32)
    top = 0
    for i in range((rows.shape[0] + 15) // 16):
        for first in range(0, out.shape[1], LANES // 32):
            _gather(rows, 16 * i, 64 * first, x)
            top = max(top, _fit(x, targets, low, high, half, q))
            for u in range(first, min(first + LANES // 32, out.shape[1])):
                unit = out[start + i * stride, u]
                _store_scales(half[32 * (u - first) :], unit)
                for block in range(2):
                    lane, word = 32 * (u - first) + 16 * block, scale_words + block * block_words
                    if storage == _NIBBLES:
                        _store_nibbles(q, lane, unit, word)
                    else:
                        _store_bytes(q, lane, unit, word)
    return top


def quantize(rows: F32, out: npt.NDArray[np.uint8], start: int, stride: int, encoding: Encoding) -> float:
    """Quantize `rows` (n, columns) into the unit rows out[start], out[start + stride], ...

    out: (unit rows, units, unit_bytes), contiguous. Returns the largest magnitude: if it is NaN or infinite, a weight
    was, and the units mean nothing.
    """
    quantizer = QUANTIZERS[encoding]
    words = encoding.scale_bytes // 4, encoding.block_bytes // 4
    search = np.float32(encoding.low), np.float32(encoding.high), quantizer.targets
    top = _quantize(rows, out.view(np.uint32), start, stride, *words, quantizer.storage, *search)
    return float(np.uint32(top).view(np.float32))


def largest_weight(encoding: Encoding) -> float:
    """The largest magnitude that an integer encoding can store: its largest integer times the largest f16."""
    return max(-encoding.low, encoding.high) * 65504.0


def pack_bf16(bits: npt.NDArray[np.uint16], out: npt.NDArray[np.uint8], start: int, stride: int) -> None:
    """Store bf16 rows (n, columns), given by their bits, in the unit rows out[start], out[start + stride], ...

    out: (unit rows, units, unit_bytes), contiguous.
    """
    n, columns = bits.shape
    unit_rows, units = ceil_div(n, UNIT_ROWS), out.shape[1]
    padded = np.zeros((unit_rows, UNIT_ROWS, units, UNIT_COLUMNS), np.uint16)
    padded.reshape(unit_rows * UNIT_ROWS, -1)[:n, :columns] = bits
    view = out.view(np.uint16)[start : start + (unit_rows - 1) * stride + 1 : stride]
    view.reshape(unit_rows, units, UNIT_COLUMNS, UNIT_ROWS)[:] = padded.transpose(0, 2, 3, 1)
