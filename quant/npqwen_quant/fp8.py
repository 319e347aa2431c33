"""FP8 checkpoints, as Qwen publishes them: weights in e4m3 with a scale for each block of a matrix.

A matrix is `weight`, F8_E4M3, and `weight_scale_inv`, a factor for each block of `weight_block_size` rows and columns;
blocks at the edges are smaller. Despite the name the weights are multiplied by it. Checkpoints without a block size
have one factor per matrix or per row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.floats import DTYPES, widen
from npqwen.format.layout import ceil_div
from npqwen.wording import quoted, shortened
from npqwen_quant.tensors import PlainTensor, SourceTensor

FP8 = "F8_E4M3"
_SCALES = ("weight_scale_inv", "weight_scale")
OF_ACTIVATIONS = {
    *("input_scale", "input_zero_point", "input_global_scale", "activation_scale"),
    # of a quantized KV cache
    *("q_scale", "k_scale", "v_scale", "k_bias", "v_bias", "output_scale", "prob_output_scale"),
}
"""Names of scales that weights do not need."""
_LARGEST_BLOCK = 1 << 20

F32 = npt.NDArray[np.float32]


def _e4m3() -> F32:
    """The values of all bytes: a sign, 4 bits of exponent, 3 of mantissa; no infinity, and NaN where all bits but
    the sign are set.
    """
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10))
    values[code & 127 == 127] = np.nan
    return np.where(code < 128, values, -values).astype(np.float32)


E4M3 = _e4m3()
E8M0: F32 = np.array([*(2.0 ** (code - 127) for code in range(255)), np.nan], np.float32)
"""The values of all bytes: powers of two, and NaN for the last."""
E8M0_TYPES = ("U8", "F8_E8M0")
"""Stored dtypes of scales in e8m0."""


class ScaledTensor(SourceTensor):
    """A matrix of e4m3 or int8 with a scale, and perhaps a zero, for each block: (value - zero) * scale."""

    def __init__(
        self, weight: PlainTensor, scale: PlainTensor, block: tuple[int, int], zero: PlainTensor | None
    ) -> None:
        """block: its rows and columns. scale and zero have one element for each block, in any shape."""
        self.path = weight.path
        self.shape = weight.shape
        self.nbytes = weight.nbytes + scale.nbytes + (0 if zero is None else zero.nbytes)
        self._weight, self._scale, self._zero = weight, scale, zero
        self._block = min(block[0], weight.shape[0]), min(block[1], weight.shape[1])
        self._blocks = blocks_of((weight.shape[0], weight.shape[1]), block)

    def read(self, first: int, count: int) -> F32:
        """See SourceTensor: float32."""
        rows = self._block[0]
        values = _values(self._weight, first * self.shape[1], count * self.shape[1]).reshape(count, -1)
        start, stop = first // rows, ceil_div(first + count, rows)
        place = start * self._blocks[1], (stop - start) * self._blocks[1]
        scales = self._wide(_factors(self._scale, *place))
        zeros = None if self._zero is None else self._wide(_values(self._zero, *place))
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            for block in range(start, stop):
                part = values[max(block * rows - first, 0) : (block + 1) * rows - first]
                if zeros is not None:
                    part -= zeros[block - start]
                part *= scales[block - start]
        return values

    def _wide(self, of_blocks: F32) -> F32:
        """Values of blocks, repeated for every column: (rows of blocks, columns)."""
        return np.repeat(of_blocks.reshape(-1, self._blocks[1]), self._block[1], 1)[:, : self.shape[1]]


def _values(tensor: PlainTensor, first: int, count: int) -> F32:
    """Elements of e4m3 or int8, as float32."""
    if tensor.stored.dtype == FP8:
        values: F32 = E4M3[tensor.elements(first, count, "u1")]
        return values
    return tensor.elements(first, count, "i1").astype(np.float32)


def _factors(tensor: PlainTensor, first: int, count: int) -> F32:
    """Elements of floats or e8m0, as float32."""
    if tensor.stored.dtype in E8M0_TYPES:
        factors: F32 = E8M0[tensor.elements(first, count, "u1")]
        return factors
    return widen(tensor.elements(first, count, DTYPES[tensor.stored.dtype]))


def scaled(
    name: str,
    weight: PlainTensor,
    scale: PlainTensor,
    blocks: Mapping[tuple[int, ...], tuple[int, int]],
    zero: PlainTensor | None = None,
) -> ScaledTensor:
    """A matrix with its scales. CheckpointError for parts of an impossible shape or dtype.

    blocks: rows and columns of a block for each shape that the scales may have.
    """
    if scale.stored.dtype not in (*DTYPES, *E8M0_TYPES):
        raise CheckpointError(
            f"{scale.path}: the scales of {shortened(name)} are stored as {shortened(scale.stored.dtype)}; they can be "
            "BF16, F16, F32 or F8_E8M0"
        )
    if scale.shape not in blocks:
        raise CheckpointError(
            f"{scale.path}: the scales of {shortened(name)} have shape {list(scale.shape)}; for a matrix of "
            f"{weight.shape[0]} x {weight.shape[1]} it must be {list(list(blocks)[-1])}"
        )
    if zero is not None and (zero.shape != scale.shape or zero.stored.dtype not in (FP8, "I8")):
        raise CheckpointError(
            f"{zero.path}: the zero points of {shortened(name)} are {shortened(zero.stored.dtype)} of shape "
            f"{list(zero.shape)}; they must be I8 or {FP8} of shape {list(scale.shape)}"
        )
    return ScaledTensor(weight, scale, blocks[scale.shape], zero)


def check_matrix(name: str, tensor: PlainTensor) -> tuple[int, int]:
    """Rows and columns. CheckpointError for a tensor that is not a matrix, or has no elements."""
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise CheckpointError(f"{tensor.path}: {shortened(name)} has shape {list(tensor.shape)}, not that of a matrix")
    return tensor.shape[0], tensor.shape[1]


def block_size(value: Any, key: str, where: str) -> tuple[int, int]:
    """Rows and columns of a block, from a configuration's value of this key, as a list or like "128x128".

    CheckpointError for anything else.
    """
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,7}x[0-9]{1,7}", value):
        value = [int(side) for side in value.split("x")]
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(side) is int and 0 < side <= _LARGEST_BLOCK for side in value)
    ):
        raise CheckpointError(f"{where}: {key} is {quoted(value)}, not the rows and columns of a block")
    return value[0], value[1]


def blocks_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """The numbers of blocks of a matrix: (down, across)."""
    return ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1])


@dataclass(frozen=True)
class Fp8:
    """`quantization_config` of an FP8 checkpoint."""

    block: tuple[int, int] | None
    """Rows and columns of a block; None for one scale per matrix or per row."""
    description = "FP8"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Fp8:
        """where: the checkpoint, for messages. CheckpointError for an impossible value."""
        block = config.get("weight_block_size")
        return cls(None if block is None else block_size(block, "weight_block_size", where))

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
                found[name] = scaled(name, tensor, scale, self._blocks(check_matrix(name, tensor)))
            elif kind not in OF_ACTIVATIONS:
                found[name] = tensor
        return found

    def _blocks(self, shape: tuple[int, int]) -> dict[tuple[int, ...], tuple[int, int]]:
        """The block for each shape that the scales of a matrix may have."""
        if self.block is not None:
            return {blocks_of(shape, self.block): self.block}
        row = (1, shape[1])
        return {(): shape, (1,): shape, (shape[0],): row, (1, 1): shape, (shape[0], 1): row}
