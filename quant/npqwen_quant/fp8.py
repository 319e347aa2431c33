"""FP8 checkpoints, as Qwen publishes them: weights in e4m3 with a scale for each block of a matrix.

A matrix is `weight`, F8_E4M3, and `weight_scale_inv`, a factor for each block of `weight_block_size` rows and columns;
blocks at the edges are smaller. Despite the name the weights are multiplied by it. Checkpoints without a block size
have one factor a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError, quoted, shortened
from npqwen.format.layout import ceil_div
from npqwen_quant.tensors import CONVERTIBLE, PlainTensor, SourceTensor, widen

FP8 = "F8_E4M3"
_SCALES = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "k_scale", "v_scale", "q_scale")
"""Names of scales that weights do not need."""
_LARGEST_BLOCK = 1 << 20

F32 = npt.NDArray[np.float32]


def _e4m3() -> F32:
    """The values of all bytes: a sign, 4 bits of exponent and 3 of mantissa, no infinity, NaN if all but the sign are
    set."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10))
    values[code & 127 == 127] = np.nan
    return np.where(code < 128, values, -values).astype(np.float32)


E4M3 = _e4m3()


class ScaledTensor(SourceTensor):
    """A matrix of e4m3 or int8 with a float32 scale for each block of its rows and columns: value * scale."""

    def __init__(self, weight: PlainTensor, scale: PlainTensor, block: tuple[int, int]) -> None:
        """block: rows and columns of a block. The scales are one for each block, in whatever shape."""
        self.path = weight.path
        self.shape = weight.shape
        self.nbytes = weight.nbytes + scale.nbytes
        self._weight, self._scale, self._block = weight, scale, block
        self._blocks = ceil_div(self.shape[0], block[0]), ceil_div(self.shape[1], block[1])

    def read(self, first: int, count: int) -> F32:
        """See SourceTensor: float32."""
        rows, columns = self._block
        values: F32
        if self._weight.stored.dtype == FP8:
            values = E4M3[self._weight.stored_rows(first, count, "u1")]
        else:
            values = self._weight.stored_rows(first, count, "i1").astype(np.float32)
        start, stop = first // rows, ceil_div(first + count, rows)
        scales = widen(self._scale.elements(start * self._blocks[1], (stop - start) * self._blocks[1]))
        wide = np.repeat(scales.reshape(stop - start, -1), columns, 1)[:, : self.shape[1]]
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            for block in range(start, stop):
                values[max(block * rows - first, 0) : (block + 1) * rows - first] *= wide[block - start]
        return values


def scaled(name: str, weight: PlainTensor, scale: PlainTensor, block: tuple[int, int] | None) -> ScaledTensor:
    """A matrix with its scales. CheckpointError for scales of an impossible shape or dtype.

    block: what a scale is for; without it, the scales' shape says whether it is for the matrix or for a row.
    """
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise CheckpointError(f"{weight.path}: {shortened(name)} has shape {list(weight.shape)}, not that of a matrix")
    if scale.stored.dtype not in CONVERTIBLE:
        raise CheckpointError(
            f"{scale.path}: the scales of {shortened(name)} are stored as {shortened(scale.stored.dtype)}; they can be "
            "BF16, F16 or F32"
        )
    rows, columns = weight.shape
    whole, row = (rows, columns), (1, columns)
    shapes: dict[tuple[int, ...], tuple[int, int]]
    if block is not None:
        shapes = {(ceil_div(rows, block[0]), ceil_div(columns, block[1])): block}
    else:
        shapes = {(): whole, (1,): whole, (rows,): row, (1, 1): whole, (rows, 1): row}
    if scale.shape not in shapes:
        raise CheckpointError(
            f"{scale.path}: the scales of {shortened(name)} have shape {list(scale.shape)}; for a matrix of "
            f"{rows} x {columns} it must be {list(list(shapes)[-1])}"
        )
    return ScaledTensor(weight, scale, shapes[scale.shape])


@dataclass(frozen=True)
class Fp8:
    """`quantization_config` of an FP8 checkpoint."""

    block: tuple[int, int] | None
    """Rows and columns of a block; None for one scale a matrix."""
    description = "FP8"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Fp8:
        """where: the checkpoint, for messages. CheckpointError for an impossible value."""
        block = config.get("weight_block_size")
        if block is None:
            return cls(None)
        if (
            not isinstance(block, list)
            or len(block) != 2
            or not all(type(side) is int and 0 < side <= _LARGEST_BLOCK for side in block)
        ):
            raise CheckpointError(f"{where}: weight_block_size is {quoted(block)}, not the rows and columns of a block")
        return cls((block[0], block[1]))

    def dequantized(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """The checkpoint's tensors, those of FP8 dequantized. CheckpointError for one without its scales."""
        found: dict[str, SourceTensor] = {}
        for name, tensor in stored.items():
            module, _, kind = name.rpartition(".")
            if kind in _SCALES:
                weight = stored.get(f"{module}.weight")
                if weight is None or weight.stored.dtype != FP8:
                    raise CheckpointError(f"{tensor.path} has {shortened(name)}, but no weights in {FP8} for it")
            elif kind == "weight" and tensor.stored.dtype == FP8:
                scale = next((stored[one] for kind in _SCALES if (one := f"{module}.{kind}") in stored), None)
                if scale is None:
                    raise CheckpointError(
                        f"{tensor.path}: {shortened(name)} is stored as {FP8} without its scales "
                        f"({_SCALES[0]}); is the download complete?"
                    )
                found[name] = scaled(name, tensor, scale, self.block)
            elif kind not in _OF_ACTIVATIONS:
                found[name] = tensor
        return found
