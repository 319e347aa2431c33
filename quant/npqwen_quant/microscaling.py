"""Microscaling: floats of 4 or 8 bits, of which small groups along a row share a scale of 8 bits.

NVFP4: e2m1, with a scale in e4m3 for each 16 columns, and one in float32 for the matrix. MXFP4 and MXFP8 (OCP
Microscaling Formats 1.0): e2m1 or e4m3, with a scale in e8m0, a power of two, for each 32 columns. Two floats of 4 bits
share a byte, the even column in its low half.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from npqwen.format.floats import DTYPES, widen
from npqwen_quant.fp8 import E4M3, E8M0, E8M0_TYPES, FP8
from npqwen_quant.parts import FLOATS, WORDS, Module
from npqwen_quant.tensors import SourceTensor

_PACKED = ("U8", *WORDS)
"""Stored dtypes of packed floats; words are little-endian."""

F32 = npt.NDArray[np.float32]


_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
"""The values of all nibbles: a sign, 2 bits of exponent, 1 of mantissa."""
ScaleFormat = Literal["e4m3", "e8m0"]
_VALUES = {"e4m3": E4M3, "e8m0": E8M0}
"""Of the bytes of scales."""
_GROUP_SIZES = {"e4m3": (16, 32), "e8m0": (32,)}
"""Columns that may share a scale: TensorRT-LLM also has NVFP4 with groups of 32."""


class MicroscaledTensor(SourceTensor):
    """A matrix of e2m1 or e4m3 whose groups of columns share a scale."""

    def __init__(
        self,
        module: Module,
        weight: str,
        scale: str,
        bits: int,
        scale_format: ScaleFormat,
        multiplier: float = 1.0,
        divisor: float = 1.0,
    ) -> None:
        """Raises CheckpointError for parts that are missing or do not fit together.

        weight, scale: names of parts. bits: 4 (e2m1) or 8 (e4m3). The scales are multiplied by multiplier and divided
        by divisor.
        """
        self._values = module.part(weight, _PACKED if bits == 4 else (*_PACKED, FP8))
        self._scales = module.part(scale, (FP8, *E8M0_TYPES))
        self._bits, self._scale_values = bits, _VALUES[scale_format]
        self._multiplier, self._divisor = np.float32(multiplier), np.float32(divisor)
        rows = self._values.shape[0]
        columns = self._values.nbytes // rows * 8 // bits
        groups = self._scales.shape[1]
        module.check_shape(scale, (rows, groups))
        sizes = _GROUP_SIZES[scale_format]
        if columns not in [groups * size for size in sizes]:
            expected = " or ".join(map(str, sizes))
            raise module.error(scale, f"has {groups} groups for {columns} columns; each must have {expected}")
        self.path = self._values.path
        self.shape = rows, columns
        self.nbytes = self._values.nbytes + self._scales.nbytes

    def read(self, first: int, count: int) -> F32:
        """See SourceTensor: float32."""
        row_bytes = self.shape[1] * self._bits // 8
        codes = self._values.elements(first * row_bytes, count * row_bytes, "u1")
        if self._bits == 4:
            values = np.empty((codes.size, 2), np.float32)
            values[:, 0], values[:, 1] = E2M1[codes & 15], E2M1[codes >> 4]
        else:
            values = E4M3[codes]
        scales = self._scale_values[self._scales.stored_rows(first, count, "u1")]
        with np.errstate(all="ignore"):  # the caller refuses what is not finite
            scales = scales * self._multiplier / self._divisor
            groups = values.reshape(count, scales.shape[1], -1)
            groups *= scales[:, :, None]
        return groups.reshape(count, -1)


def scalar(module: Module, kind: str) -> float:
    """The only element of a part, a positive number. CheckpointError if it is missing or anything else."""
    part = module.part(kind, FLOATS, range(3))
    if math.prod(part.shape) != 1:
        raise module.error(kind, f"has the shape {list(part.shape)}, not that of one number")
    value = float(widen(part.elements(0, 1, DTYPES[part.stored.dtype]))[0])
    if not 0 < value < math.inf:
        raise module.error(kind, f"is {value:g}, not a positive number")
    return value
