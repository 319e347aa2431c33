"""out = weight @ x for tiles of 16 tokens on a processor with AMX; bitwise equal to the other kernels' sums.

Weights of fewer than 8 bits are unpacked once for all tokens; int8 weights are read where they are mapped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npqwen.format.encodings import CODEBOOK_BYTES, UNIT_BLOCKS, UNIT_ROWS, Encoding
from npqwen.kernels.entry import entry
from npqwen.simd.amx import (
    SUM_BYTES,
    UNPACKED_BLOCK,
    configure,
    finish_block,
    load_signed_codebook,
    release,
    start_block,
    unpack_signed,
)
from npqwen.simd.instructions import PREFETCH_DISTANCE
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import CACHE_LINE
from npqwen.simd.packed import block_bytes
from npqwen.simd.scalar import memory
from npqwen.simd.tile import prefetch, scale_rows, store, store_add, zeros

_UNPACKED_UNIT = UNIT_BLOCKS * UNPACKED_BLOCK
AMX_ROOM_BYTES = 2 * SUM_BYTES
"""Bytes of scratch in addition to unpacked weights."""


def amx_rows(encoding: Encoding) -> Any:
    """The kernel for an integer encoding; its arguments are those of all kernels (npqwen/kernels/matmul.py)."""
    code, unit, block_size = encoding.code, encoding.unit_bytes, encoding.block_bytes
    row_scale_bytes, scale_bytes = encoding.row_scale_bytes, encoding.scale_bytes
    unpacks = block_size < UNPACKED_BLOCK
    x_block = block_bytes(UNIT_ROWS, ISA.start_bytes)
    prefetched = scale_bytes if unpacks else unit  # unpacking prefetches what it reads

    @entry(encoding.name)
    def amx_rows(
        address: int, codebook: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int,
        accumulate: int, scratch: int,
    ) -> None:  # fmt: skip
        group_bytes = row_scale_bytes + units * unit
        w = memory(address, last * group_bytes, np.uint8)
        packed = memory(x, tiles * units * UNIT_BLOCKS * x_block, np.uint8)
        results = memory(out, tiles * UNIT_ROWS * stride, np.float32)
        room = memory((scratch + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE, 2 * SUM_BYTES, np.uint8)
        table = load_signed_codebook(code, memory(codebook, CODEBOOK_BYTES, np.uint8))
        if unpacks:
            values = memory(room.ctypes.data + 2 * SUM_BYTES, (last - first) * units * _UNPACKED_UNIT, np.uint8)
        else:
            values = memory(address + first * group_bytes, (last - first) * group_bytes, np.uint8)
        configure()
        for tile in range(tiles):
            for group in range(first, last):
                sums = zeros(UNIT_ROWS, 1, 1)
                unit_at = group * group_bytes + row_scale_bytes
                if unpacks:
                    at = (group - first) * units * _UNPACKED_UNIT
                else:
                    at = (group - first) * group_bytes + row_scale_bytes + scale_bytes
                x_at = tile * units * UNIT_BLOCKS * x_block
                if unpacks and tile == 0:
                    unpack_signed(code, table, w, unit_at + scale_bytes, values, at)
                start_block(0, values, at, packed, x_at)
                for u in range(units):
                    if tile == 0:
                        prefetch(w, unit_at + PREFETCH_DISTANCE, prefetched)
                    # Two blocks per iteration, one in each set of registers; the next one is started, too.
                    for pair in range(UNIT_BLOCKS // 2):
                        scales_at = unit_at + 2 * UNIT_ROWS * pair
                        second = unit_at + scale_bytes + (2 * pair + 1) * block_size
                        following = second + block_size
                        next_at = at + 2 * UNPACKED_BLOCK
                        next_x = x_at + 2 * x_block
                        if pair == UNIT_BLOCKS // 2 - 1:
                            if u + 1 < units:
                                following += scale_bytes
                                if not unpacks:
                                    next_at += scale_bytes
                            else:
                                # The last block is started again, and not used: that saves a branch.
                                following -= block_size
                                next_at -= UNPACKED_BLOCK
                                next_x -= x_block
                        if unpacks and tile == 0:
                            unpack_signed(code, table, w, second, values, at + UNPACKED_BLOCK)
                            unpack_signed(code, table, w, following, values, next_at)
                        start_block(1, values, at + UNPACKED_BLOCK, packed, x_at + x_block)
                        sums = finish_block(sums, 0, w, scales_at, packed, x_at, room)
                        start_block(0, values, next_at, packed, next_x)
                        sums = finish_block(sums, 1, w, scales_at + UNIT_ROWS, packed, x_at + x_block, room)
                        at = next_at
                        x_at = next_x
                    unit_at += unit
                sums = scale_rows(sums, 1, w, group * group_bytes)
                place = tile * UNIT_ROWS * stride + group * UNIT_ROWS
                if accumulate:
                    store_add(sums, results, place, 1, stride)
                else:
                    store(sums, results, place, 1, stride)
        release()

    return amx_rows
