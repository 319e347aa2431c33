"""bitsandbytes checkpoints: NF4 and FP4, and LLM.int8().

4 bits (QLoRA, Dettmers et al. 2023): `weight` has two codes in a byte, the first in its high half, row after row;
`weight.quant_map` is their 16 values, and `weight.absmax` the scale of each block of consecutive weights.
`weight.quant_state.bitsandbytes__nf4` (or `fp4`) is a JSON object with the matrix's shape and the block size. With
double quantization, absmax is in bytes: codes of `weight.nested_quant_map`, times `weight.nested_absmax` of their
block, plus an offset.

8 bits: `weight` in int8, and `SCB`, the largest magnitude of each row, which 127 stands for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.wording import quoted
from npqwen_quant.parts import Module, UnreadableError, modules
from npqwen_quant.tensors import PlainTensor, SourceTensor

_STATE = "weight.quant_state.bitsandbytes__"
_OF_WEIGHT = "weight."
_STORAGE = ("U8", "I8", "BF16", "F16", "F32")
"""Dtypes whose bytes may hold codes (bnb_4bit_quant_storage)."""
_MOST_STATE_BYTES = 10_000
_SCALES, _ORDER = "SCB", "weight_format"
_UNIT = np.float32(7.874015718698502e-3)
"""1 / 127, as bitsandbytes writes it."""

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Nested:
    """What the codes of quantized scales stand for."""

    values: F32
    """(256,)."""
    absmax: F32
    """Of blocks of codes."""
    block: int
    """Codes of a block."""
    offset: np.float32

    def scales(self, codes: npt.NDArray[np.uint8], first: int) -> F32:
        """The scales that codes stand for, of which the first has the index `first`."""
        block = np.arange(first, first + len(codes)) // self.block
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            scales: F32 = self.values[codes] * self.absmax[block] + self.offset
        return scales


class FourBitTensor(SourceTensor):
    """A matrix in NF4 or FP4."""

    def __init__(self, module: Module) -> None:
        """Raises CheckpointError for parts that are missing or do not fit together."""
        self._codes = module.part("weight", _STORAGE, range(1, 3))
        self._kind = next(kind for kind in module.parts if kind.startswith(_STATE))
        state = self._state(module)
        self.shape = state["shape"][0], state["shape"][1]
        size = self.shape[0] * self.shape[1]
        if self._codes.nbytes != -(-size // 2):
            shape = quoted(list(self.shape))
            raise module.error("weight", f"has {self._codes.nbytes:,} bytes, which the shape {shape} does not fit")
        self._block = min(state["blocksize"], size)
        blocks = -(-size // self._block)
        self._absmax = module.part("weight.absmax", ("F32", "U8"), (1,))
        module.check_shape("weight.absmax", (blocks,))
        self._map = _floats(module, "weight.quant_map", 16)
        self._nested: _Nested | None = None
        if self._absmax.stored.dtype == "U8":
            nested_block = _positive(module, self._kind, state, "nested_blocksize")
            self._nested = _Nested(
                _floats(module, "weight.nested_quant_map", 256),
                _floats(module, "weight.nested_absmax", -(-blocks // nested_block)),
                nested_block,
                np.float32(_number(module, self._kind, state, "nested_offset")),
            )
        self.path = self._codes.path
        self.nbytes = self._codes.nbytes + self._absmax.nbytes

    def _state(self, module: Module) -> dict[str, Any]:
        """The matrix's description, its shape and block size checked."""
        part = module.part(self._kind, ("U8",), (1,))
        if part.nbytes > _MOST_STATE_BYTES:
            raise module.error(self._kind, f"has {part.nbytes:,} bytes, too many for a description")
        try:
            state = json.loads(part.elements(0, part.nbytes, "u1").tobytes())
        except (ValueError, RecursionError):
            state = None
        if not isinstance(state, dict):
            raise module.error(self._kind, "is not a JSON object")
        shape = state.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise module.error(self._kind, f"has the shape {quoted(shape)}, not rows and columns")
        _positive(module, self._kind, state, "blocksize")
        return state

    def read(self, first: int, count: int) -> F32:
        """See SourceTensor: float32."""
        columns = self.shape[1]
        start, stop = first * columns, (first + count) * columns
        codes = self._codes.elements(start // 2, -(-stop // 2) - start // 2, "u1")
        values = np.empty((codes.size, 2), np.float32)
        values[:, 0], values[:, 1] = self._map[codes >> 4], self._map[codes & 15]
        wanted = values.reshape(-1)[start % 2 :][: stop - start]
        block = start // self._block
        scales = self._scales(block, -(-stop // self._block) - block)
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            wanted *= scales[np.arange(start, stop) // self._block - block]
        return wanted.reshape(count, columns)

    def _scales(self, first: int, count: int) -> F32:
        """The scales of `count` blocks."""
        if self._nested is None:
            return self._absmax.elements(first, count, "<f4")
        return self._nested.scales(self._absmax.elements(first, count, "u1"), first)


class EightBitTensor(SourceTensor):
    """A matrix of LLM.int8()."""

    def __init__(self, module: Module) -> None:
        """Raises CheckpointError for parts that are missing or do not fit together."""
        self._weight = module.part("weight", ("I8",))
        self._scales = module.part(_SCALES, ("F32",), (1,))
        module.check_shape(_SCALES, self._weight.shape[:1])
        if _ORDER in module and module.part(_ORDER, ("U8",), range(2)).elements(0, 1, "u1")[0]:
            raise module.error(_ORDER, "is not 0: the matrix is not stored by rows, which npqwen does not read")
        self.path, self.shape = self._weight.path, self._weight.shape
        self.nbytes = self._weight.nbytes + self._scales.nbytes

    def read(self, first: int, count: int) -> F32:
        """See SourceTensor: float32."""
        values: F32 = self._weight.stored_rows(first, count, "i1").astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            values *= self._scales.elements(first, count, "<f4")[:, None]
            values *= _UNIT
        return values


@dataclass(frozen=True)
class BitsAndBytes:
    """`quantization_config` of a bitsandbytes checkpoint."""

    description: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BitsAndBytes:
        """The tensors say the rest."""
        if config.get("load_in_8bit"):
            return cls("bitsandbytes, 8 bits")
        kind = config.get("bnb_4bit_quant_type") or "fp4"
        if kind not in ("nf4", "fp4"):
            raise UnreadableError(f"bitsandbytes, {kind}")
        return cls(f"bitsandbytes, {str(kind).upper()}")

    def dequantized(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """The checkpoint's tensors, its quantized matrices dequantized. CheckpointError for one that is incomplete."""
        found: dict[str, SourceTensor] = {}
        for module in modules(stored):
            of_weight = [kind for kind in module.parts if kind.startswith(_OF_WEIGHT)]
            weight = module.parts.get("weight")
            if any(kind.startswith(_STATE) for kind in of_weight):
                found[module.weight] = FourBitTensor(module)
            elif _SCALES in module or (weight is not None and weight.stored.dtype == "I8"):
                found[module.weight] = EightBitTensor(module)
            elif of_weight:
                raise module.error(of_weight[0], f"has no {_STATE}nf4 beside it; is the download complete?")
            elif weight is not None:
                found[module.weight] = weight
            found |= module.others("weight", _SCALES, _ORDER, *of_weight)
        return found


def _floats(module: Module, kind: str, count: int) -> F32:
    """The elements of a part, which has `count` float32."""
    part = module.part(kind, ("F32",), (1,))
    module.check_shape(kind, (count,))
    found: F32 = part.elements(0, count, "<f4")
    return found


def _positive(module: Module, kind: str, state: Mapping[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise module.error(kind, f"has the {key} {quoted(value)}, not a number of weights")
    return value


def _number(module: Module, kind: str, state: Mapping[str, Any], key: str) -> float:
    value = state.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise module.error(kind, f"has the {key} {quoted(value)}, not a number")
    return float(value)


