"""AWQ checkpoints (AutoAWQ, version "gemm"): integers of 4 bits with a scale and a zero for each group of columns.

A matrix of (rows, columns) is stored transposed. `qweight`: (columns, rows / 8), `qzeros`: (groups, rows / 8), each
word with the integers of 8 rows in the order of _PLACES; `scales`: (groups, rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.floats import widen
from npqwen.format.layout import ceil_div
from npqwen.wording import quoted
from npqwen_quant.by_columns import ColumnsTensor, Loaded
from npqwen_quant.parts import FLOATS, WORDS, Module, UnreadableError, check_group_size, fitting_size, modules, unpack
from npqwen_quant.recent import Recent
from npqwen_quant.tensors import PlainTensor, SourceTensor

BITS = 4
_IN_WORD = 8
_PARTS = {"qweight", "qzeros", "scales"}
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The position in a word of the integer of each of its 8 rows."""


class AwqTensor(ColumnsTensor):
    """A matrix of an AWQ checkpoint."""

    def __init__(self, module: Module, config: Awq, recent: Recent[Loaded]) -> None:
        """Raises CheckpointError for parts that are missing or do not fit together."""
        super().__init__(recent)
        self._packed = module.part("qweight", WORDS)
        self._zeros = module.part("qzeros", WORDS)
        self._scales = module.part("scales", FLOATS)
        columns, words = self._packed.shape
        self._group_size = fitting_size(columns, self._scales.shape[0], (config.group_size, *config.other_sizes))
        groups = ceil_div(columns, self._group_size)
        module.check_shape("scales", (groups, words * _IN_WORD))
        module.check_shape("qzeros", (groups, words))
        self.path = self._packed.path
        self.shape = words * _IN_WORD, columns
        self.nbytes = self._packed.nbytes + self._zeros.nbytes + self._scales.nbytes

    def load(self) -> Loaded:
        """See ColumnsTensor."""
        columns = self.shape[1]
        packed = self._packed.stored_rows(0, columns, "<u4")
        zeros = _integers(self._zeros.stored_rows(0, self._zeros.shape[0], "<u4"))
        scales = widen(self._scales.read(0, self._scales.shape[0]))
        groups = np.arange(columns) // self._group_size
        return Loaded(packed, np.ascontiguousarray(zeros.T), np.ascontiguousarray(scales.T), groups)

    def integers(self, packed: npt.NDArray[np.uint32], first: int, count: int) -> npt.NDArray[np.uint8]:
        """See ColumnsTensor."""
        start = first // _IN_WORD
        integers = _integers(packed[:, start : ceil_div(first + count, _IN_WORD)])
        skipped = first - start * _IN_WORD
        return np.ascontiguousarray(integers[:, skipped : skipped + count].T)


def _integers(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The integers (columns or groups, rows) of words (columns or groups, rows / 8)."""
    places = unpack(words, BITS, words.shape[1] * _IN_WORD).reshape(len(words), -1, _IN_WORD)
    return places[:, :, _PLACES].reshape(len(words), -1)


@dataclass(frozen=True)
class Awq:
    """`quantization_config` of an AWQ checkpoint."""

    group_size: int
    """-1: all columns are one group."""
    other_sizes: tuple[int, ...] = ()
    """Group sizes that some modules may have."""
    description = "AWQ, 4 bits"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Awq:
        """where: the checkpoint, for messages. CheckpointError for an impossible value or another layout."""
        bits = config.get("bits", config.get("w_bit"))
        size = config.get("group_size", config.get("q_group_size", -1))
        version = config.get("version") or config.get("format") or "gemm"  # the latter in transformers 5
        if type(bits) is not int:
            raise CheckpointError(f"{where}: AWQ's bits are {quoted(bits)}, not a number")
        if bits != BITS:
            raise UnreadableError(f"AWQ, {bits} bits")
        if config.get("backend") == "llm-awq":  # other backends are kernels for the same layout
            version = "llm-awq"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise UnreadableError(f"AWQ, {version}")
        check_group_size(size, where)
        return cls(size)

    def dequantized(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """The checkpoint's tensors, its quantized matrices dequantized. CheckpointError for one that is incomplete."""
        recent = Recent[Loaded]()
        found: dict[str, SourceTensor] = {}
        for module in modules(stored):
            if _PARTS & module.parts.keys():
                found[module.weight] = AwqTensor(module, self, recent)
            found |= module.others(*_PARTS)
        return found
