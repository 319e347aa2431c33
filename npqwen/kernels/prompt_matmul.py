"""out = weight @ x for long parts of prompts on a processor with AMX: in bf16, by tiles of 32 tokens.

Weights are unpacked once for all tiles, times their blocks' scales; activations are rounded to bf16. Both roundings,
and the order of the sums, differ from the other kernels'. A token's results depend on its own activations alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import BLOCK_COLUMNS, CODEBOOK_BYTES, ENCODINGS, UNIT_BLOCKS, UNIT_ROWS, Encoding
from npqwen.kernels.entry import entry
from npqwen.simd.amx import load_signed_codebook, release
from npqwen.simd.amx_bf16 import (
    REGISTER_BYTES,
    clear_sums,
    configure_full,
    multiply_blocks,
    store_sums,
    unpack_bfloats,
)
from npqwen.simd.instructions import PREFETCH_DISTANCE
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import CACHE_LINE
from npqwen.simd.scalar import memory
from npqwen.simd.tile import LANES, load, prefetch, scale_rows, store, store_add, zeros

PROMPT_WIDTH = ISA.prompt_width
"""The width of the tiles in passes over long parts of prompts; 0: there are none."""
_TOGETHER = 2
"""Row groups that are multiplied at once."""
_WRITTEN = 4
"""Tokens whose results are scaled and written at once."""
_SUM_FLOATS = PROMPT_WIDTH * UNIT_ROWS
_UNPACKED_UNIT = UNIT_BLOCKS * REGISTER_BYTES
_X_BLOCK = 2 * BLOCK_COLUMNS * PROMPT_WIDTH
_VECTORS = UNIT_ROWS // LANES


def prompt_bytes(cols: int, chunk_bytes: int) -> int:
    """Bytes of scratch for chunks of `chunk_bytes` of weights, or one row group of `cols` columns if that is more."""
    if not PROMPT_WIDTH:
        return 0
    smallest = min(encoding.unit_bytes for encoding in ENCODINGS if encoding.is_integer)
    values = max(2 * cols * UNIT_ROWS, chunk_bytes // smallest * _UNPACKED_UNIT)
    return CACHE_LINE + _TOGETHER * 4 * _SUM_FLOATS + values


def prompt_rows(encoding: Encoding) -> Any:
    """The kernel for an integer encoding; its arguments are those of all kernels (npqwen/kernels/matmul.py)."""
    code, unit, block_size = encoding.code, encoding.unit_bytes, encoding.block_bytes
    row_scale_bytes, scale_bytes = encoding.row_scale_bytes, encoding.scale_bytes
    prefetched = scale_bytes if ISA.prefetches else unit  # unpacking prefetches what it reads

    @entry(encoding.name)
    def prompt_rows(
        address: int, codebook: int, units: int, first: int, last: int, x: int, tiles: int, out: int, stride: int,
        accumulate: int, scratch: int,
    ) -> None:  # fmt: skip
        group_bytes = row_scale_bytes + units * unit
        w = memory(address, last * group_bytes, np.uint8)
        packed = memory(x, tiles * units * UNIT_BLOCKS * _X_BLOCK, np.uint8)
        results = memory(out, tiles * PROMPT_WIDTH * stride, np.float32)
        room = (scratch + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        sums = memory(room, _TOGETHER * _SUM_FLOATS, np.float32)
        values = memory(room + _TOGETHER * 4 * _SUM_FLOATS, (last - first) * units * _UNPACKED_UNIT, np.uint8)
        table = load_signed_codebook(code, memory(codebook, CODEBOOK_BYTES, np.uint8))
        at = 0
        for group in range(first, last):
            scales_at = group * group_bytes + row_scale_bytes
            for _ in range(units):
                prefetch(w, scales_at + PREFETCH_DISTANCE, prefetched)
                for block in range(UNIT_BLOCKS):
                    block_at = scales_at + scale_bytes + block * block_size
                    unpack_bfloats(code, table, w, block_at, scales_at + block * UNIT_ROWS, values, at)
                    at += REGISTER_BYTES
                scales_at += unit
        pitch = units * _UNPACKED_UNIT
        rest = last - (last - first) % _TOGETHER
        configure_full()
        for tile in range(tiles):
            x_at, origin = tile * units * UNIT_BLOCKS * _X_BLOCK, tile * PROMPT_WIDTH * stride
            for group in range(first, rest, _TOGETHER):
                _multiply(_TOGETHER, values, (group - first) * pitch, pitch, packed, x_at, sums)
                for n in range(_TOGETHER):
                    row_scales_at, place = (group + n) * group_bytes, origin + (group + n) * UNIT_ROWS
                    _write(w, row_scales_at, sums, n * _SUM_FLOATS, results, place, stride, accumulate)
            if rest < last:
                _multiply(1, values, (rest - first) * pitch, pitch, packed, x_at, sums)
                _write(w, rest * group_bytes, sums, 0, results, origin + rest * UNIT_ROWS, stride, accumulate)
        release()

    return prompt_rows


@njit(inline="always")
def _multiply(groups: int, values: Any, at: int, pitch: int, packed: Any, x_at: int, sums: Any) -> None:
    """sums = `groups` row groups, 1 or 2, of unpacked weights @ a tile of tokens.

    values[at:], packed[x_at:]: uint8. pitch: bytes of an unpacked row group. sums: float32, see `store_sums`.
    """
    clear_sums(groups)
    for _ in range(pitch // REGISTER_BYTES):
        multiply_blocks(groups, values, at, pitch, packed, x_at)
        at += REGISTER_BYTES
        x_at += _X_BLOCK
    store_sums(groups, sums)


@njit(inline="always")
def _write(w: Any, row_scales_at: int, sums: Any, at: int, out: Any, place: int, stride: int, accumulate: int) -> None:
    """out[place:] = or += the sums of a row group at sums[at:] times its row scales at w[row_scales_at:]."""
    for token in range(0, PROMPT_WIDTH, _WRITTEN):
        scaled = load(zeros(_WRITTEN, _VECTORS, 1), sums, at + token * UNIT_ROWS, _VECTORS, UNIT_ROWS)
        scaled = scale_rows(scaled, _VECTORS, w, row_scales_at)
        if accumulate:
            store_add(scaled, out, place + token * stride, _VECTORS, stride)
        else:
            store(scaled, out, place + token * stride, _VECTORS, stride)
