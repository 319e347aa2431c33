"""The formats of tensors in GGUF files, and their dequantization, bitwise equal to ggml's.

A row is a number of blocks, each of 32 or 256 weights. A weight is `scale * q`, or `scale * q - minimum`. Blocks of 256
weights are divided into groups, whose scales are small integers times the block's float16 `d`. Layouts and formulas are
those of ggml/src/ggml-common.h and dequantize_row_* in ggml-quants.c. float32 represents all products of a scale and a
quantized value exactly, so that neither evaluation order nor a fused multiply-add makes a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_PART = 1 << 18
"""Weights dequantized at a time, to bound the memory of intermediate results."""

_NONLINEAR = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)  # ggml's kvalues_iq4nl
_TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # kvalues_mxfp4
_HALF_E8M0 = np.exp2(np.arange(256) - 128.0).astype(np.float32)
"""Half the scales that bytes stand for; unlike the standard, ggml knows no NaN."""


@dataclass(frozen=True)
class GgmlType:
    """A format.

    weights, nbytes: of a block. floats: the NumPy dtype of a format that is not quantized ("<u2" for the bits of bf16).
    dequantize: maps blocks (n, nbytes) to their weights (n, weights).
    """

    name: str
    weights: int
    nbytes: int
    floats: str | None = None
    dequantize: Callable[[U8], F32] | None = None

    def decode(self, rows: U8) -> npt.NDArray[Any]:
        """The weights (rows, columns) of rows (rows, bytes): as they are stored, or dequantized to float32."""
        if self.floats is not None:
            stored: npt.NDArray[Any] = rows.view(self.floats)
            return stored
        assert self.dequantize is not None
        blocks = rows.reshape(-1, self.nbytes)
        out = np.empty((len(blocks), self.weights), np.float32)
        step = _PART // self.weights
        with np.errstate(invalid="ignore", over="ignore"):  # damaged scales; what is not finite is refused later
            for first in range(0, len(blocks), step):
                out[first : first + step] = self.dequantize(blocks[first : first + step])
        return out.reshape(len(rows), -1)


def _half(blocks: U8, at: int) -> F32:
    """The float16 at byte offset `at` of each block, as float32 (n, 1)."""
    half: npt.NDArray[np.float16] = blocks[:, at : at + 2].copy().view("<f2")
    return half.astype(np.float32)


def _nibbles(packed: U8, group: int) -> U8:
    """The nibbles of bytes (n, bytes): of every `group` bytes first the low ones, then the high ones (n, 2 * bytes)."""
    return _bits(packed, group, 4)


def _bits(packed: U8, group: int, width: int) -> U8:
    """The bit fields of `width` bits of bytes (n, bytes): of every `group` bytes first the lowest, then the next."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields: U8 = packed.reshape(len(packed), -1, 1, group) >> shifts & np.uint8((1 << width) - 1)
    return fields.reshape(len(packed), -1)


def _grouped(values: npt.NDArray[np.generic], groups: int) -> F32:
    """float32 (n, groups, weights of a group)."""
    return values.astype(np.float32).reshape(len(values), groups, -1)


def _q4_0(blocks: U8) -> F32:
    out: F32 = (_nibbles(blocks[:, 2:], 16).view(np.int8) - np.int8(8)) * _half(blocks, 0)
    return out


def _q4_1(blocks: U8) -> F32:
    out: F32 = _nibbles(blocks[:, 4:], 16) * _half(blocks, 0) + _half(blocks, 2)
    return out


def _fifth(blocks: U8, at: int) -> U8:
    """5-bit weights: 4 bytes with the highest bit of each weight, then 16 bytes with the low nibbles."""
    high = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    out: U8 = _nibbles(blocks[:, at + 4 :], 16) | high << np.uint8(4)
    return out


def _q5_0(blocks: U8) -> F32:
    out: F32 = (_fifth(blocks, 2).view(np.int8) - np.int8(16)) * _half(blocks, 0)
    return out


def _q5_1(blocks: U8) -> F32:
    out: F32 = _fifth(blocks, 4) * _half(blocks, 0) + _half(blocks, 2)
    return out


def _q8_0(blocks: U8) -> F32:
    out: F32 = blocks[:, 2:].view(np.int8) * _half(blocks, 0)
    return out


def _iq4_nl(blocks: U8) -> F32:
    out: F32 = _NONLINEAR[_nibbles(blocks[:, 2:], 16)] * _half(blocks, 0)
    return out


def _mxfp4(blocks: U8) -> F32:
    out: F32 = _TWICE_E2M1[_nibbles(blocks[:, 1:], 16)] * _HALF_E8M0[blocks[:, :1]]
    return out


def _q2_k(blocks: U8) -> F32:
    scales, minimums = blocks[:, :16] & 15, blocks[:, :16] >> 4
    scale = (_half(blocks, 80) * scales)[:, :, None]
    minimum = (_half(blocks, 82) * minimums)[:, :, None]
    out: F32 = scale * _grouped(_bits(blocks[:, 16:80], 32, 2), 16) - minimum
    return out.reshape(-1, 256)


def _q3_k(blocks: U8) -> F32:
    packed = blocks[:, 96:108]
    scales = _bits(packed[:, :8], 8, 4) | _bits(packed[:, 8:], 4, 2) << 4
    scale = (_half(blocks, 108) * (scales.view(np.int8) - np.int8(32)))[:, :, None]
    # A set bit of the mask means that nothing is subtracted.
    values = (_bits(blocks[:, 32:96], 32, 2) | _bits(blocks[:, :32], 32, 1) << 2).view(np.int8) - np.int8(4)
    out: F32 = scale * _grouped(values, 16)
    return out.reshape(-1, 256)


def _scales_and_minimums(packed: U8) -> tuple[U8, U8]:
    """Eight 6-bit scales and eight 6-bit minimums from 12 bytes: 4 bytes with a scale each, 4 with a minimum each, and
    4 with the low nibbles of the other 4 + 4, whose high 2 bits are those of the first 8 bytes."""
    low, high, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (both & 15) | (low >> 6) << 4], 1)
    minimums = np.concatenate([high & 63, both >> 4 | (high >> 6) << 4], 1)
    return scales, minimums


def _with_minimums(blocks: U8, values: U8) -> F32:
    """Weights of Q4_K and Q5_K: d, dmin, scales and minimums are at the same offsets."""
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales)[:, :, None]
    minimum = (_half(blocks, 2) * minimums)[:, :, None]
    out: F32 = scale * _grouped(values, 8) - minimum
    return out.reshape(-1, 256)


def _q4_k(blocks: U8) -> F32:
    return _with_minimums(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: U8) -> F32:
    values: U8 = _nibbles(blocks[:, 48:], 32) | _bits(blocks[:, 16:48], 32, 1) << np.uint8(4)
    return _with_minimums(blocks, values)


def _q6_k(blocks: U8) -> F32:
    scale = (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[:, :, None]
    values = (_nibbles(blocks[:, :128], 64) | _bits(blocks[:, 128:192], 32, 2) << 4).view(np.int8) - np.int8(32)
    out: F32 = scale * _grouped(values, 16)
    return out.reshape(-1, 256)


def _iq4_xs(blocks: U8) -> F32:
    scales = _bits(blocks[:, 4:8], 1, 4) | _bits(blocks[:, 2:4], 1, 2) << 4
    scale = (_half(blocks, 0) * (scales.view(np.int8) - np.int8(32)))[:, :, None]
    out: F32 = scale * _grouped(_NONLINEAR[_nibbles(blocks[:, 8:], 16)], 8)
    return out.reshape(-1, 256)


TYPES = {
    0: GgmlType("F32", 1, 4, "<f4"),
    1: GgmlType("F16", 1, 2, "<f2"),
    30: GgmlType("BF16", 1, 2, "<u2"),
    8: GgmlType("Q8_0", 32, 34, None, _q8_0),
    2: GgmlType("Q4_0", 32, 18, None, _q4_0),
    3: GgmlType("Q4_1", 32, 20, None, _q4_1),
    6: GgmlType("Q5_0", 32, 22, None, _q5_0),
    7: GgmlType("Q5_1", 32, 24, None, _q5_1),
    10: GgmlType("Q2_K", 256, 84, None, _q2_k),
    11: GgmlType("Q3_K", 256, 110, None, _q3_k),
    12: GgmlType("Q4_K", 256, 144, None, _q4_k),
    13: GgmlType("Q5_K", 256, 176, None, _q5_k),
    14: GgmlType("Q6_K", 256, 210, None, _q6_k),
    20: GgmlType("IQ4_NL", 32, 18, None, _iq4_nl),
    23: GgmlType("IQ4_XS", 256, 136, None, _iq4_xs),
    39: GgmlType("MXFP4", 32, 17, None, _mxfp4),
}
"""The formats that are read, by ggml's type numbers."""

_OTHERS = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}


def type_name(number: int) -> str:
    """ggml's name of a type."""
    found = TYPES.get(number)
    return found.name if found is not None else _OTHERS.get(number, f"type {number}")
