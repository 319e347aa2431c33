"""out = weight @ x for tiles of 16 tokens on a processor with AMX: the same sums, to the bit, in half the time.

Weights of fewer than 8 bits are unpacked once for all tokens; int8 weights are read where they are mapped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npqwen.format.encodings import ENCODINGS, Encoding
from npqwen.kernels.entry import entry
from npqwen.kernels.packing import BLOCK_BYTES
from npqwen.simd.amx import (
    SUM_BYTES,
    UNPACKED_BLOCK,
    configure,
    finish_block,
    release,
    start_block,
    unpack_block,
)
from npqwen.simd.instructions import AHEAD, CACHE_LINE
from npqwen.simd.scalar import memory
from npqwen.simd.tile import ROWS, add, prefetch, store, zeros

_UNPACKED = 2 * UNPACKED_BLOCK
"""Bytes of a unit as int8."""


def unpacked_bytes(cols: int, chunk: int) -> int:
    """Scratch that a thread needs for pieces of `chunk` bytes, or of one group of rows where that is more."""
    smallest = min(encoding.unit_bytes for encoding in ENCODINGS if encoding.is_integer)
    return CACHE_LINE + 2 * SUM_BYTES + max(cols * ROWS, chunk // smallest * _UNPACKED)


def amx_rows(encoding: Encoding) -> Any:
    """The kernel for an integer encoding; its arguments are those of all kernels (kernels/matmul.py)."""
    code, unit, scale_bytes, half = encoding.code, encoding.unit_bytes, encoding.scale_bytes, encoding.block_bytes
    packs = encoding.block_bytes < UNPACKED_BLOCK
    step = BLOCK_BYTES * ROWS
    asked = scale_bytes if packs else unit

    @entry(encoding.name)
    def amx_rows(
        address: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int, plus: int,
        scratch: int,
    ) -> None:  # fmt: skip
        w = memory(address, last * units * unit, np.uint8)
        packed = memory(x, tiles * units * 2 * step, np.uint8)
        flat = memory(out, tiles * ROWS * stride, np.float32)
        room = memory((scratch + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE, 2 * SUM_BYTES, np.uint8)
        if packs:
            values = memory(room.ctypes.data + 2 * SUM_BYTES, (last - first) * units * _UNPACKED, np.uint8)
            pitch, origin = _UNPACKED, 0
        else:
            values = memory(address + first * units * unit, (last - first) * units * unit, np.uint8)
            pitch, origin = unit, scale_bytes
        configure()
        for tile in range(tiles):
            for group in range(first, last):
                sums = zeros(ROWS, 1, 1)
                unit_at = group * units * unit
                at = (group - first) * units * pitch + origin
                x_at = tile * units * 2 * step
                if packs and tile == 0:
                    unpack_block(code, w, unit_at + scale_bytes, values, at)
                    unpack_block(code, w, unit_at + scale_bytes + half, values, at + UNPACKED_BLOCK)
                start_block(0, values, at, packed, x_at)
                for u in range(units):
                    # After the last unit it is multiplied once more, for nothing.
                    more = 1 if u + 1 < units else 0
                    following = at + more * pitch
                    if tile == 0:
                        prefetch(w, unit_at + AHEAD, asked)
                        if packs:
                            place = unit_at + more * unit + scale_bytes
                            unpack_block(code, w, place, values, following)
                            unpack_block(code, w, place + half, values, following + UNPACKED_BLOCK)
                    start_block(1, values, at + UNPACKED_BLOCK, packed, x_at + step)
                    sums = finish_block(sums, 0, w, unit_at, packed, x_at, room)
                    start_block(0, values, following, packed, x_at + 2 * more * step)
                    sums = finish_block(sums, 1, w, unit_at + 32, packed, x_at + step, room)
                    at = following
                    unit_at += unit
                    x_at += 2 * step
                place = tile * ROWS * stride + group * ROWS
                if plus:
                    add(sums, flat, place, 1, stride)
                else:
                    store(sums, flat, place, 1, stride)
        release()

    return amx_rows
