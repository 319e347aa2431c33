"""out = weight @ x for many tiles of tokens: weights of fewer than 8 bits are unpacked once for all tiles.

The sums are bitwise equal to those of the kernels that unpack for every tile (npqwen/kernels/matmul.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import CODEBOOK_BYTES, ENCODINGS, UNIT_BLOCKS, UNIT_COLUMNS, UNIT_ROWS, Encoding
from npqwen.kernels.entry import entry, run_at
from npqwen.simd.instructions import PREFETCH_DISTANCE, UNPACKED
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import CACHE_LINE
from npqwen.simd.packed import block_bytes
from npqwen.simd.scalar import memory
from npqwen.simd.tile import (
    LANES,
    dot_block_unpacked,
    load,
    load_codebook,
    prefetch,
    scale_rows,
    store,
    store_add,
    unpack_block,
    zeros,
)

UNPACKED_UNIT = UNIT_BLOCKS * UNPACKED.block_bytes
_UNIT_BYTES = tuple(encoding.unit_bytes for encoding in ENCODINGS)
PANEL_UNITS = 4
"""Units of a row group that are unpacked at a time for all tiles: 8 KiB."""
PANEL_TILES = 64
"""Most tiles that they are unpacked for."""
PANEL_BYTES = CACHE_LINE + PANEL_UNITS * UNPACKED_UNIT + 4 * PANEL_TILES * max(ISA.tiles) * UNIT_ROWS
"""Bytes of an unpacked panel and of the tiles' sums, with room to align them."""
_UNPACKED_BLOCK = UNPACKED.block_bytes
_ROW_SCALE_BYTES = UNPACKED.row_scale_bytes
_SCALE_BYTES = UNPACKED.scale_bytes


def unpacked_bytes(cols: int, chunk_bytes: int) -> int:
    """Bytes of unpacked chunks of `chunk_bytes` of weights, or of one row group of `cols` columns if that is more; with
    room to align them."""
    smallest = min(encoding.unit_bytes for encoding in ENCODINGS if encoding.is_integer)
    return CACHE_LINE + max(cols * UNIT_ROWS, chunk_bytes // smallest * UNPACKED_UNIT)


def unpack_rows(encoding: Encoding) -> Any:
    """The kernel that unpacks row groups first to last - 1 of a matrix to `values`: UNPACKED_UNIT bytes per unit."""
    code, unit, block_size = encoding.code, encoding.unit_bytes, encoding.block_bytes
    row_scale_bytes, scale_bytes = encoding.row_scale_bytes, encoding.scale_bytes
    prefetched = scale_bytes if ISA.prefetches else unit  # unpacking prefetches what it reads

    @entry(encoding.name)
    def unpack_rows(address: int, codebook: int, units: int, first: int, last: int, values: int) -> None:
        w = memory(address, last * (row_scale_bytes + units * unit), np.uint8)
        table = load_codebook(code, memory(codebook, CODEBOOK_BYTES, np.uint8))
        out = memory(values, (last - first) * units * UNPACKED_UNIT, np.uint8)
        at = 0
        for group in range(first, last):
            block_at = group * (row_scale_bytes + units * unit) + row_scale_bytes
            for _ in range(units):
                prefetch(w, block_at + PREFETCH_DISTANCE, prefetched)
                block_at += scale_bytes
                for _ in range(UNIT_BLOCKS):
                    unpack_block(code, table, w, block_at, out, at)
                    block_at += block_size
                    at += _UNPACKED_BLOCK

    return unpack_rows


def unpacked_rows(tokens: int) -> Any:
    """The kernel for unpacked weights and tiles of `tokens` tokens, the widest.

    values: from `unpack_rows`, whose row groups are first to last - 1 of the matrix at `address`, of units of `unit`
    bytes, scales first. The other arguments are those of all kernels (npqwen/kernels/matmul.py).
    """
    vectors = ISA.unpacked_vectors
    rows = vectors * LANES
    x_block = block_bytes(tokens, ISA.start_bytes)

    @entry(tokens, vectors)
    def unpacked_rows(
        address: int, unit: int, values: int, units: int, first: int, last: int, x: int, tiles: int, out: int,
        stride: int, accumulate: int,
    ) -> None:  # fmt: skip
        group_bytes = _ROW_SCALE_BYTES + units * unit
        w = memory(address, last * group_bytes, np.uint8)
        unpacked = memory(values, (last - first) * units * UNPACKED_UNIT, np.uint8)
        packed = memory(x, tiles * units * UNIT_BLOCKS * x_block, np.uint8)
        results = memory(out, tiles * tokens * stride, np.float32)
        for tile in range(tiles):
            for group in range(first, last):
                for row in range(0, UNIT_ROWS, rows):
                    sums = zeros(tokens, vectors, 1)
                    at = (group - first) * units * UNPACKED_UNIT + 4 * row
                    scales_at = group * group_bytes + _ROW_SCALE_BYTES + row
                    x_at = tile * units * UNIT_BLOCKS * x_block
                    for half in range(2 * units):
                        sums = dot_block_unpacked(sums, tokens, unpacked, at, w, scales_at, packed, x_at)
                        at += _UNPACKED_BLOCK
                        x_at += x_block
                        sums = dot_block_unpacked(sums, tokens, unpacked, at, w, scales_at + UNIT_ROWS, packed, x_at)
                        at += _UNPACKED_BLOCK
                        x_at += x_block
                        # The second half ends the unit.
                        scales_at += 2 * UNIT_ROWS + half % 2 * (unit - _SCALE_BYTES)
                    sums = scale_rows(sums, vectors, w, group * group_bytes + 4 * row)
                    place = tile * tokens * stride + group * UNIT_ROWS + row
                    if accumulate:
                        store_add(sums, results, place, vectors, stride)
                    else:
                        store(sums, results, place, vectors, stride)

    return unpacked_rows


def panel_rows(encoding: Encoding, tokens: int) -> Any:
    """The kernel for tiles of `tokens` tokens by 16 rows that unpacks PANEL_UNITS of a row group, a panel, at a time.

    A panel stays in the first-level cache while all tiles are multiplied by it. Arguments are those of all kernels
    (npqwen/kernels/matmul.py); scratch has PANEL_BYTES.
    """
    vectors = UNIT_ROWS // LANES
    code, unit, block_size = encoding.code, encoding.unit_bytes, encoding.block_bytes
    half_unit = unit // 2
    x_block, tile_floats = block_bytes(tokens, ISA.start_bytes), tokens * UNIT_ROWS

    @entry(encoding.name, tokens)
    def panel_rows(
        address: int, codebook: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int,
        accumulate: int, scratch: int,
    ) -> None:  # fmt: skip
        group_bytes = _ROW_SCALE_BYTES + units * unit
        w = memory(address, last * group_bytes, np.uint8)
        table = load_codebook(code, memory(codebook, CODEBOOK_BYTES, np.uint8))
        packed = memory(x, tiles * units * UNIT_BLOCKS * x_block, np.uint8)
        results = memory(out, tiles * tokens * stride, np.float32)
        values = (scratch + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        unpacked = memory(values, PANEL_UNITS * UNPACKED_UNIT, np.uint8)
        partial = memory(values + PANEL_UNITS * UNPACKED_UNIT, PANEL_TILES * tile_floats, np.float32)
        for group in range(first, last):
            for first_tile in range(0, tiles, PANEL_TILES):
                for start in range(0, units, PANEL_UNITS):
                    count = min(PANEL_UNITS, units - start)
                    panel_at = group * group_bytes + _ROW_SCALE_BYTES + start * unit
                    block_at, value_at = panel_at, 0
                    for _ in range(count):
                        block_at += _SCALE_BYTES
                        for _ in range(UNIT_BLOCKS):
                            unpack_block(code, table, w, block_at, unpacked, value_at)
                            block_at += block_size
                            value_at += _UNPACKED_BLOCK
                    for tile in range(first_tile, min(first_tile + PANEL_TILES, tiles)):
                        sums = zeros(tokens, vectors, 1)
                        partial_at = (tile - first_tile) * tile_floats
                        if start > 0:
                            sums = load(sums, partial, partial_at, vectors, UNIT_ROWS)
                        value_at, scales_at = 0, panel_at
                        x_at = (tile * units + start) * UNIT_BLOCKS * x_block
                        ahead = panel_at + count * unit
                        for half in range(2 * count):
                            if tile == first_tile:
                                # Prefetch the next panel while this one is multiplied.
                                prefetch(w, ahead, half_unit)
                                ahead += half_unit
                            sums = dot_block_unpacked(sums, tokens, unpacked, value_at, w, scales_at, packed, x_at)
                            value_at += _UNPACKED_BLOCK
                            x_at += x_block
                            sums = dot_block_unpacked(
                                sums, tokens, unpacked, value_at, w, scales_at + UNIT_ROWS, packed, x_at
                            )
                            value_at += _UNPACKED_BLOCK
                            x_at += x_block
                            # The second half ends the unit.
                            scales_at += 2 * UNIT_ROWS + half % 2 * (unit - _SCALE_BYTES)
                        if start + count < units:
                            store(sums, partial, partial_at, vectors, UNIT_ROWS)
                        else:
                            sums = scale_rows(sums, vectors, w, group * group_bytes)
                            place = tile * tokens * stride + group * UNIT_ROWS
                            if accumulate:
                                store_add(sums, results, place, vectors, stride)
                            else:
                                store(sums, results, place, vectors, stride)

    return panel_rows


@njit(nogil=True)
def run_unpacked(
    unpack: int, multiply: int, encoding: int, address: int, codebook: int, cols: int, tiles: int, x: int, first: int,
    last: int, out: int, stride: int, accumulate: int, scratch: Any,
) -> None:  # fmt: skip
    """Unpack row groups first to last - 1 to `scratch`, and multiply them by all tiles.

    unpack, multiply: addresses of the two kernels' machine code. scratch: float32 of `unpacked_bytes`.
    """
    units = cols // UNIT_COLUMNS
    values = (scratch.ctypes.data + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
    run_at(unpack, (address, codebook, units, first, last, values))
    run_at(
        multiply,
        (address, _UNIT_BYTES[encoding], values, units, first, last, x, tiles, out, stride, accumulate),
    )
