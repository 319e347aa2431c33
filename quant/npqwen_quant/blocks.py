"""Blocks of weights: 32 of a row's columns share one f16 scale, chosen for the least squared error.

Everything works on blocks of 16 rows at a time, held column by column: lane r of every loop over 16 is row
r, which LLVM makes vector instructions of, and which is the order of the file (FORMAT.md, "Units").
Integers travel as u32 words, four little-endian bytes each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from npqwen.kernels.compiled import CodeCache

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]
I32 = npt.NDArray[np.int32]

UNIT_ROWS = 16
UNIT_COLUMNS = 64
UNIT_BYTES = {"int4": 576, "int8": 1088, "bf16": 2048}

LANES = 128  # blocks at a time: 16 rows of four units, which fill vectors of any width

# The bits of float32's infinity: those of a NaN's magnitude are greater, those of any number smaller.
INFINITY = 0x7F800000

# What a block's largest weight is scaled to, before rounding, in each candidate: beyond the range of the
# integers clips it, which a block with few large weights gains from.  The signed range -8..7 makes both signs
# worth trying.  The squared error is then 0.01 % (int8: 4 %) above what the best of all f16 scales leaves.
INT4_TARGETS = np.concatenate([-np.linspace(6.6, 9.5, 16), np.linspace(5.8, 8.6, 16)]).astype(np.float32)
INT8_TARGETS = np.linspace(112, 127.4, 16).astype(np.float32)

# The largest weight a block can hold: the largest target times the largest f16.
LARGEST = {"int4": 8 * 65504.0, "int8": 127 * 65504.0}

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
    """Fill x[c, lane] from row `first` and column `column` on; zeros where the matrix has ended."""
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
    """largest[lane]: the weight of largest magnitude, with its sign.  Returns the bits of the largest."""
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
def _search(x: F32, targets: F32, low: F32, high: F32, largest: F32, scale: F32) -> None:
    """scale[lane]: the least-squares scale of the integers that the best of the targets rounds to.

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
            # Where all is zero these are NaN, and so never better.
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
    """Finite f16, given by their bits, as float32, and 1 / x, or 0 for 0."""
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
def _fit(x: F32, targets: F32, low: F32, high: F32, half: I32, q: I32) -> int:
    """Choose the scale and the integers of each lane's block.

    x is (32, lanes) weights, half becomes the bits of the f16 scales, q (32, lanes) the integers from low to
    high.  Returns the bits of the largest magnitude.
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
    # Rounded to f16 the scale is another, and rounds the weights otherwise: so measure its neighbours too.
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
def quantize_int4(rows: F32, out: U32, tile: int, stride: int, targets: F32) -> int:
    """Quantize `rows` (n, columns) into the int4 units out[tile], out[tile + stride], …

    `out` is (tiles, units, 144) words.  Returns the bits of the largest magnitude met: from INFINITY on, a
    weight was not finite and the units mean nothing.
    """
    x = np.empty((32, LANES), np.float32)
    q = np.empty((32, LANES), np.int32)
    half = np.empty(LANES, np.int32)
    top = 0
    for i in range((rows.shape[0] + 15) // 16):
        for first in range(0, out.shape[1], LANES // 32):
            _gather(rows, 16 * i, 64 * first, x)
            top = max(top, _fit(x, targets, np.float32(-8), np.float32(7), half, q))
            for u in range(first, min(first + LANES // 32, out.shape[1])):
                unit = out[tile + i * stride, u]
                _store_scales(half[32 * (u - first) :], unit)
                for block in range(2):
                    lane = 32 * (u - first) + 16 * block
                    for j in range(4):
                        for r in range(16):
                            word = 0
                            for k in range(4):
                                low, high = q[4 * j + k, lane + r] + 8, q[16 + 4 * j + k, lane + r] + 8
                                word |= (low | high << 4) << 8 * k
                            unit[16 + 64 * block + 16 * j + r] = word
    return top


@_jit
def quantize_int8(rows: F32, out: U32, tile: int, stride: int, targets: F32) -> int:
    """Quantize `rows` (n, columns) into int8 units, as quantize_int4 does; `out` is (tiles, units, 272)."""
    x = np.empty((32, LANES), np.float32)
    q = np.empty((32, LANES), np.int32)
    half = np.empty(LANES, np.int32)
    top = 0
    for i in range((rows.shape[0] + 15) // 16):
        for first in range(0, out.shape[1], LANES // 32):
            _gather(rows, 16 * i, 64 * first, x)
            top = max(top, _fit(x, targets, np.float32(-127), np.float32(127), half, q))
            for u in range(first, min(first + LANES // 32, out.shape[1])):
                unit = out[tile + i * stride, u]
                _store_scales(half[32 * (u - first) :], unit)
                for block in range(2):
                    lane = 32 * (u - first) + 16 * block
                    for j in range(8):
                        for r in range(16):
                            word = 0
                            for k in range(4):
                                word |= (q[4 * j + k, lane + r] & 255) << 8 * k
                            unit[16 + 128 * block + 16 * j + r] = word
    return top


def pack_bf16(bits: npt.NDArray[np.uint16], out: npt.NDArray[np.uint16], tile: int, stride: int) -> None:
    """Lay bf16 rows (n, columns), given by their bits, into the units out[tile], out[tile + stride], …

    `out` is (tiles, units, 1024).
    """
    n, columns = bits.shape
    tiles, units = -(-n // UNIT_ROWS), out.shape[1]
    padded = np.zeros((tiles, UNIT_ROWS, units, UNIT_COLUMNS), np.uint16)
    padded.reshape(tiles * UNIT_ROWS, -1)[:n, :columns] = bits
    view = out[tile : tile + (tiles - 1) * stride + 1 : stride]
    view.reshape(tiles, units, UNIT_COLUMNS, UNIT_ROWS)[:] = padded.transpose(0, 2, 3, 1)
