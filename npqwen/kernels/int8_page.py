"""Keys and values of int8: their layout in a page of the KV cache, and writing those of a token.

A head's keys, or values, are 8 tiles of 32 positions. A tile begins with the float32 scales of its positions: the
largest magnitude / 127. Then follow blocks of 16 rows x 32 columns of int8 as in matrices of the encoding INT8, so that
scores and weighted sums are products like a matrix's:

    keys    rows are positions, columns coordinates: the blocks of positions 0 to 15, then those of 16 to 31
    values  rows are coordinates, columns the 32 positions: a block for each 16 coordinates

A block has 8 lines of 64 bytes, one for each 4 neighbouring columns: 16 rows of 4 bytes. head_dim is padded to a
multiple of 32. Keys are stored rotated by a Walsh-Hadamard transform (`rotate_coordinates`), as are the queries that
they are multiplied by: it spreads the few large coordinates of Qwen3's keys, whose scale would cost the others
precision (QuaRot, Ashkboos et al. 2024).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable
from numpy.typing import NDArray

from npqwen.format.encodings import BLOCK_COLUMNS, LINE_BYTES, UNIT_ROWS
from npqwen.kernels.cache_page import PAGE
from npqwen.simd.blocks import hadamard_block
from npqwen.simd.scalar import bits_float, float_bits, memory, round_even

INT8_TILE = 32
"""Positions of a tile."""
SCALES_BYTES = 4 * INT8_TILE
"""Bytes of a tile's scales."""
_BLOCK_BYTES = UNIT_ROWS * BLOCK_COLUMNS


@register_jitable
def padded_dim(head_dim: int) -> int:
    """head_dim, rounded up to whole blocks."""
    return (head_dim + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS * BLOCK_COLUMNS


@register_jitable
def int8_tile_bytes(head_dim: int) -> int:
    """Bytes of a head's keys, or values, of INT8_TILE positions."""
    return SCALES_BYTES + INT8_TILE * padded_dim(head_dim)


# Without fast-math: LLVM would reassociate the sums, differently in each copy of the function that it inlines.
@njit(nogil=True, error_model="numpy")
def rotate_coordinates(x: Any) -> None:
    """Normalized Walsh-Hadamard transform of x, float32, in place, in parts of the largest size 2**n that divides
    x.size.

    x.size is a multiple of 16. The dot product of two rotated vectors is that of the originals.
    """
    size = x.size & -x.size
    for at in range(0, x.size, UNIT_ROWS):
        hadamard_block(x, at)
    stride = UNIT_ROWS
    while stride < size:
        for first in range(0, x.size, 2 * stride):
            for i in range(first, first + stride):
                a, b = x[i], x[i + stride]
                x[i], x[i + stride] = a + b, a - b
        stride *= 2
    scale = np.float32(1.0) / np.sqrt(np.float32(size))
    for i in range(x.size):
        x[i] *= scale


@njit(nogil=True, error_model="numpy")
def _scale(x: Any) -> np.float32:
    """The scale for rounding x, float32, to int8: its largest magnitude / 127."""
    peak = np.int32(0)  # magnitudes of floats order like their bits
    for i in range(x.size):
        peak = max(peak, float_bits(x[i]) & np.int32(0x7FFFFFFF))
    return bits_float(peak) * np.float32(1 / 127)


@njit(nogil=True, error_model="numpy")
def _inverse(scale: np.float32) -> np.float32:
    """1 / scale, or 0 if the scale is NaN or too small to invert."""
    return np.float32(1.0) / scale if scale > np.float32(1e-32) else np.float32(0.0)


@njit(nogil=True)
def _tile(pages: Any, index: int, position: int, head_dim: int) -> Any:
    """The tile that holds a position of the head at an index: its scales, and its bytes after them."""
    size = int8_tile_bytes(head_dim)
    start = pages[position // PAGE] + (index * (PAGE // INT8_TILE) + position % PAGE // INT8_TILE) * size
    return memory(start, INT8_TILE, np.float32), memory(start + SCALES_BYTES, size - SCALES_BYTES, np.int8)


@njit(nogil=True, error_model="numpy")
def store_int8_key(pages: Any, index: int, position: int, key: Any) -> None:
    """Write one head's key, float32 (head_dim,), into the cache; index = (layer * 2) * kv_heads + head.

    pages: int64, the pages' addresses. The key is rotated in place.
    """
    rotate_coordinates(key)
    scales, values = _tile(pages, index, position, key.size)
    scale = _scale(key)
    inverse = _inverse(scale)
    slot = position % INT8_TILE
    scales[slot] = scale
    at = slot // UNIT_ROWS * UNIT_ROWS * padded_dim(key.size) + slot % UNIT_ROWS * 4
    for i in range(0, key.size, 4):
        line = at + i // 4 * LINE_BYTES
        for k in range(4):
            values[line + k] = np.int8(round_even(key[i + k] * inverse))


@njit(nogil=True, error_model="numpy")
def store_int8_value(pages: Any, index: int, position: int, value: Any) -> None:
    """Write one head's value, float32 (head_dim,), into the cache; index = (layer * 2 + 1) * kv_heads + head.

    pages: int64, the pages' addresses.
    """
    scales, values = _tile(pages, index, position, value.size)
    scale = _scale(value)
    inverse = _inverse(scale)
    slot = position % INT8_TILE
    scales[slot] = scale
    at = slot // 4 * LINE_BYTES + slot % 4
    for i in range(0, value.size, UNIT_ROWS):
        block = at + i // UNIT_ROWS * _BLOCK_BYTES
        for r in range(UNIT_ROWS):
            values[block + 4 * r] = np.int8(round_even(value[i + r] * inverse))


def clear_int8_positions(tiles: NDArray[np.uint8], first: int) -> None:
    """Zero the positions starting at `first` in one tile of each head: tiles (layers, 2, heads, bytes)."""
    for position in range(first, INT8_TILE):
        tiles[..., 4 * position : 4 * position + 4] = 0
        block, row = divmod(position, UNIT_ROWS)
        size = (tiles.shape[-1] - SCALES_BYTES) // 2
        for k in range(4):
            tiles[
                :, 0, :, SCALES_BYTES + block * size + 4 * row + k : SCALES_BYTES + (block + 1) * size : LINE_BYTES
            ] = 0
        start = SCALES_BYTES + position // 4 * LINE_BYTES + position % 4
        for r in range(UNIT_ROWS):
            tiles[:, 1, :, start + 4 * r :: _BLOCK_BYTES] = 0
