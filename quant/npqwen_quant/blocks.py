"""Blocks of weights: 32 of a row's columns share one f16 scale, chosen for the least squared error.

Everything works on blocks of 16 rows at a time, held column by column: lane r of every loop over 16 is row
r, which LLVM makes vector instructions of, and which is the order of the file (FORMAT.md, "Units").
Integers travel as u32 words, four little-endian bytes each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]
I32 = npt.NDArray[np.int32]

UNIT_ROWS = 16
UNIT_COLUMNS = 64
UNIT_BYTES = {"int4": 576, "int8": 1088, "bf16": 2048}

# The bits of float32's infinity: those of a NaN's magnitude are greater, those of any number smaller.
INFINITY = 0x7F800000

# What a block's largest weight is scaled to, before rounding, in each candidate: beyond the range of the
# integers clips it, which a block with few large weights gains from.  The signed range -8..7 makes both signs
# worth trying.  Within 0.1 % of the best f16 scale's squared error on trained weights.
INT4_TARGETS = np.concatenate([-np.linspace(7, 9, 10), np.linspace(6.4, 7.8, 6)]).astype(np.float32)
INT8_TARGETS = np.array([127, 126.5, 126, 127.4], np.float32)

# The largest weight a block can hold: the largest target times the largest f16.
LARGEST = {"int4": 8 * 65504.0, "int8": 127 * 65504.0}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _jit(function: _Function) -> _Function:
    # Rounding to f16 by integers forbids "reassoc"; "nnan" and "ninf" would break the search for both.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
    try:
        compiled: _Function = njit(cache=True, **options)(function)
    except RuntimeError:  # no directory for the cache is writable
        compiled = njit(**options)(function)
    return compiled


@_jit
def _gather(rows: F32, first: int, column: int, x: F32) -> None:
    """Copy 16 rows of 32 columns into x[column, row]; zeros where the matrix has ended."""
    row_count, column_count = rows.shape
    for r in range(16):
        row = first + r
        if row >= row_count:
            for c in range(32):
                x[c, r] = 0
        elif column + 32 <= column_count:
            for c in range(32):
                x[c, r] = rows[row, column + c]
        else:
            for c in range(32):
                x[c, r] = rows[row, column + c] if column + c < column_count else np.float32(0)


@_jit
def _largest(x: F32, largest: F32) -> int:
    """Each row's weight of largest magnitude, with its sign; the bits of the largest of all."""
    bits = x.view(np.int32)
    magnitude = np.zeros(16, np.int32)
    for c in range(32):
        for r in range(16):
            a = bits[c, r] & 0x7FFFFFFF
            largest[r] = x[c, r] if a > magnitude[r] else largest[r]
            magnitude[r] = max(a, magnitude[r])
    top = 0
    for r in range(16):
        top = max(top, magnitude[r])
    return top


@_jit
def _search(x: F32, largest: F32, targets: F32, low: F32, high: F32, scale: F32) -> None:
    """scale[row]: the best least-squares scale among those of the integers that each target rounds to.

    With integers q, the scale (w·q)/(q·q) leaves the error w·w - (w·q)²/(q·q).
    """
    inverse = np.empty(16, np.float32)
    wq = np.empty(16, np.float32)
    qq = np.empty(16, np.float32)
    best = np.zeros(16, np.float32)
    for r in range(16):
        scale[r] = 0
    for target in targets:
        for r in range(16):
            # Weights this small are zero at any f16 scale, and 1 / w may overflow.
            inverse[r] = target / largest[r] if abs(largest[r]) > np.float32(2.0**-30) else np.float32(0)
            wq[r] = 0
            qq[r] = 0
        for c in range(32):
            for r in range(16):
                w = x[c, r]
                q = min(max(np.rint(w * inverse[r]), low), high)
                # In units of the largest weight's step, so that squares neither overflow nor underflow.
                wq[r] += w * inverse[r] * q
                qq[r] += q * q
        for r in range(16):
            gain = wq[r] * wq[r] / qq[r]
            gain = gain / (inverse[r] * inverse[r])
            better = gain > best[r]
            scale[r] = wq[r] / qq[r] / inverse[r] if better else scale[r]
            best[r] = gain if better else best[r]


@_jit
def _to_f16(x: F32, half: I32) -> None:
    """The bits of the f16 nearest to each non-negative float32, ties to even; 65504 at most."""
    shifted = x + np.float32(0.5)  # float32 near 0.5 has the spacing of subnormal f16, 2^-24
    subnormal = shifted.view(np.int32)
    normal = x.view(np.int32)
    for r in range(16):
        n = normal[r] - (112 << 23)
        n = (n + 0xFFF + ((n >> 13) & 1)) >> 13
        small = x[r] < np.float32(2.0**-14)
        half[r] = min(subnormal[r] - 0x3F000000 if small else n, 0x7BFF)


@_jit
def _from_f16(half: I32, x: F32) -> None:
    """Each non-negative finite f16, given by its bits, as float32."""
    bits = x.view(np.int32)
    for r in range(16):
        bits[r] = (half[r] << 13) + (112 << 23)
    for r in range(16):
        x[r] = np.float32(half[r]) * np.float32(2.0**-24) if half[r] < 0x400 else x[r]


@_jit
def _fit(x: F32, targets: F32, low: F32, high: F32, half: I32, q: I32) -> int:
    """Choose 16 rows' scales and integers for a block.

    x is (32, 16) weights, half becomes the bits of 16 f16 scales, q (32, 16) the integers from low to high.
    Returns the bits of the largest magnitude.
    """
    largest = np.zeros(16, np.float32)
    top = _largest(x, largest)
    scale = np.empty(16, np.float32)
    _search(x, largest, targets, low, high, scale)
    size = np.abs(scale)
    nearest = np.empty(16, np.int32)
    _to_f16(size, nearest)
    sign = np.empty(16, np.float32)
    for r in range(16):
        sign[r] = np.float32(-1) if scale[r] < 0 else np.float32(1)
    tried = np.empty(16, np.int32)
    inverse = np.empty(16, np.float32)
    error = np.empty(16, np.float32)
    least = np.empty(16, np.float32)
    # Rounded to f16 the scale is another, and rounds the weights otherwise: so measure its neighbours too.
    for step in (0, -1, 1):
        for r in range(16):
            tried[r] = min(max(nearest[r] + step, 0), 0x7BFF)
            error[r] = 0
        _from_f16(tried, size)
        for r in range(16):
            inverse[r] = sign[r] / size[r] if tried[r] > 0 else np.float32(0)
        for c in range(32):
            for r in range(16):
                # In steps of the scale: squares of weights could underflow.
                w = x[c, r] * inverse[r]
                e = w - min(max(np.rint(w), low), high)
                error[r] += e * e
        for r in range(16):
            error[r] = error[r] * size[r] * size[r]
            better = step == 0 or error[r] < least[r]
            least[r] = error[r] if better else least[r]
            half[r] = tried[r] if better else half[r]
    _from_f16(half, size)
    for r in range(16):
        inverse[r] = sign[r] / size[r] if half[r] > 0 else np.float32(0)
    for c in range(32):
        for r in range(16):
            q[c, r] = np.int32(min(max(np.rint(x[c, r] * inverse[r]), low), high))
    for r in range(16):
        half[r] |= 0x8000 if sign[r] < 0 and half[r] > 0 else 0
    return top


@_jit
def _store_scales(half: I32, words: U32) -> None:
    for i in range(8):
        words[i] = np.uint32(half[2 * i]) | np.uint32(half[2 * i + 1]) << np.uint32(16)


@_jit
def quantize_int4(rows: F32, out: U32, tile: int, stride: int, targets: F32) -> int:
    """Quantize `rows` (n, columns) into the int4 units out[tile], out[tile + stride], …

    `out` is (tiles, units, 144) words.  Returns the bits of the largest magnitude met: from INFINITY on, a
    weight was not finite and the units mean nothing.
    """
    x = np.empty((32, 16), np.float32)
    q = np.empty((32, 16), np.int32)
    half = np.empty(16, np.int32)
    low, high = np.float32(-8), np.float32(7)
    top = 0
    for i in range((rows.shape[0] + 15) // 16):
        for u in range(out.shape[1]):
            unit = out[tile + i * stride, u]
            for block in range(2):
                _gather(rows, 16 * i, 64 * u + 32 * block, x)
                top = max(top, _fit(x, targets, low, high, half, q))
                _store_scales(half, unit[8 * block : 8 * block + 8])
                words = unit[16 + 64 * block : 80 + 64 * block]
                for j in range(4):
                    for r in range(16):
                        word = np.uint32(0)
                        for k in range(4):
                            pair = (q[4 * j + k, r] + 8) | (q[16 + 4 * j + k, r] + 8) << 4
                            word |= np.uint32(pair) << np.uint32(8 * k)
                        words[16 * j + r] = word
    return top


@_jit
def quantize_int8(rows: F32, out: U32, tile: int, stride: int, targets: F32) -> int:
    """Quantize `rows` (n, columns) into int8 units, as quantize_int4 does; `out` is (tiles, units, 272)."""
    x = np.empty((32, 16), np.float32)
    q = np.empty((32, 16), np.int32)
    half = np.empty(16, np.int32)
    low, high = np.float32(-127), np.float32(127)
    top = 0
    for i in range((rows.shape[0] + 15) // 16):
        for u in range(out.shape[1]):
            unit = out[tile + i * stride, u]
            for block in range(2):
                _gather(rows, 16 * i, 64 * u + 32 * block, x)
                top = max(top, _fit(x, targets, low, high, half, q))
                _store_scales(half, unit[8 * block : 8 * block + 8])
                words = unit[16 + 128 * block : 144 + 128 * block]
                for j in range(8):
                    for r in range(16):
                        word = np.uint32(0)
                        for k in range(4):
                            word |= np.uint32(q[4 * j + k, r] & 255) << np.uint32(8 * k)
                        words[16 * j + r] = word
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
