"""out = weight @ x for tiles of 16 tokens on a processor with AMX: the sums of the other kernels, to the bit.

Weights of fewer than 8 bits are unpacked once for all tokens; int8 weights are read where they are mapped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npqwen.format.encodings import ENCODINGS, UNIT_BLOCKS, UNIT_ROWS, Encoding
from npqwen.kernels.entry import entry
from npqwen.simd.amx import (
    SUM_BYTES,
    UNPACKED_BLOCK,
    configure,
    finish_block,
    release,
    start_block,
    unpack_block,
)
from npqwen.simd.instructions import PREFETCH_DISTANCE
from npqwen.simd.llvm import CACHE_LINE
from npqwen.simd.packed import block_bytes
from npqwen.simd.scalar import memory
from npqwen.simd.tile import prefetch, store, store_add, zeros

_UNPACKED_UNIT = UNIT_BLOCKS * UNPACKED_BLOCK


def unpacked_bytes(cols: int, chunk_bytes: int) -> int:
    """Bytes of scratch for chunks of `chunk_bytes` of weights, or of one row group where that is more."""
    smallest = min(encoding.unit_bytes for encoding in ENCODINGS if encoding.is_integer)
    return CACHE_LINE + 2 * SUM_BYTES + max(cols * UNIT_ROWS, chunk_bytes // smallest * _UNPACKED_UNIT)


def amx_rows(encoding: Encoding) -> Any:
    """The kernel for an integer encoding; its arguments are those of all kernels (npqwen/kernels/matmul.py)."""
    code, unit, scale_bytes, half = encoding.code, encoding.unit_bytes, encoding.scale_bytes, encoding.block_bytes
    unpacks = encoding.block_bytes < UNPACKED_BLOCK
    x_block = block_bytes(UNIT_ROWS)
    scales = scale_bytes // UNIT_BLOCKS
    prefetched = scale_bytes if unpacks else unit  # unpacking prefetches what it reads

    @entry(encoding.name)
    def amx_rows(
        address: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int, accumulate: int,
        scratch: int,
    ) -> None:  # fmt: skip
        w = memory(address, last * units * unit, np.uint8)
        packed = memory(x, tiles * units * UNIT_BLOCKS * x_block, np.uint8)
        results = memory(out, tiles * UNIT_ROWS * stride, np.float32)
        room = memory((scratch + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE, 2 * SUM_BYTES, np.uint8)
        if unpacks:
            values = memory(room.ctypes.data + 2 * SUM_BYTES, (last - first) * units * _UNPACKED_UNIT, np.uint8)
            pitch, origin = _UNPACKED_UNIT, 0
        else:
            values = memory(address + first * units * unit, (last - first) * units * unit, np.uint8)
            pitch, origin = unit, scale_bytes
        configure()
        for tile in range(tiles):
            for group in range(first, last):
                sums = zeros(UNIT_ROWS, 1, 1)
                unit_at = group * units * unit
                at = (group - first) * units * pitch + origin
                x_at = tile * units * UNIT_BLOCKS * x_block
                if unpacks and tile == 0:
                    unpack_block(code, w, unit_at + scale_bytes, values, at)
                    unpack_block(code, w, unit_at + scale_bytes + half, values, at + UNPACKED_BLOCK)
                start_block(0, values, at, packed, x_at)
                for u in range(units):
                    # The last unit is started once more, for nothing: that saves a branch.
                    more = 1 if u + 1 < units else 0
                    following = at + more * pitch
                    if tile == 0:
                        prefetch(w, unit_at + PREFETCH_DISTANCE, prefetched)
                        if unpacks:
                            place = unit_at + more * unit + scale_bytes
                            unpack_block(code, w, place, values, following)
                            unpack_block(code, w, place + half, values, following + UNPACKED_BLOCK)
                    start_block(1, values, at + UNPACKED_BLOCK, packed, x_at + x_block)
                    sums = finish_block(sums, 0, w, unit_at, packed, x_at, room)
                    start_block(0, values, following, packed, x_at + UNIT_BLOCKS * more * x_block)
                    sums = finish_block(sums, 1, w, unit_at + scales, packed, x_at + x_block, room)
                    at = following
                    unit_at += unit
                    x_at += UNIT_BLOCKS * x_block
                place = tile * UNIT_ROWS * stride + group * UNIT_ROWS
                if accumulate:
                    store_add(sums, results, place, 1, stride)
                else:
                    store(sums, results, place, 1, stride)
        release()

    return amx_rows
