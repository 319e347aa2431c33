"""GPTQ checkpoints (AutoGPTQ, GPTQModel): integers with a scale and a zero for each group of columns.

A matrix of (rows, columns) is stored transposed. `qweight`: (words, rows), a row's integers one after the other in a
column of words. `scales`: (groups, rows). `qzeros`: (groups, words), the zeros of a group's rows packed; the format
"gptq" stores zeros minus one, "gptq_v2" stores them as they are. `g_idx`: the group of each column, in any order
("act-order"); without it, groups are of `group_size` columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.floats import widen
from npqwen.format.layout import ceil_div
from npqwen.wording import quoted
from npqwen_quant.by_columns import ColumnsTensor, Loaded
from npqwen_quant.parts import (
    FLOATS,
    INDICES,
    WORDS,
    Module,
    UnreadableError,
    check_group_size,
    fitting_size,
    modules,
    packed_words,
    unpack,
)
from npqwen_quant.recent import Recent
from npqwen_quant.tensors import PlainTensor, SourceTensor

BITS = (2, 3, 4, 8)
_STORED_MINUS = {"gptq": 1, "gptq_v2": 0}
_PARTS = {"qweight", "qzeros", "scales", "g_idx"}


class GptqTensor(ColumnsTensor):
    """A matrix of a GPTQ checkpoint."""

    def __init__(self, module: Module, config: Gptq, recent: Recent[Loaded]) -> None:
        """Raises CheckpointError for parts that are missing or do not fit together."""
        super().__init__(recent)
        self._module = module
        self._stored_minus = _STORED_MINUS[config.format]
        self._packed = module.part("qweight", WORDS)
        self._zeros = module.part("qzeros", WORDS)
        self._scales = module.part("scales", FLOATS)
        self._indices = module.part("g_idx", INDICES, (1,)) if "g_idx" in module else None
        words, rows = self._packed.shape
        self._bits = self._bits_of((config.bits, *config.widths))
        columns = words * 32 // self._bits if self._indices is None else self._indices.shape[0]
        groups = self._scales.shape[0]
        if packed_words(columns, self._bits) != words:
            raise module.error("g_idx", f"has {columns} columns, but qweight has {words} rows of words")
        size = fitting_size(columns, groups, (config.group_size, *config.other_sizes))
        if self._indices is None and groups != ceil_div(columns, size):
            raise module.error("scales", f"has {groups} groups; {columns} columns have {ceil_div(columns, size)}")
        module.check_shape("scales", (groups, rows))
        module.check_shape("qzeros", (groups, packed_words(rows, self._bits)))
        self._group_size = size
        self.path = self._packed.path
        self.shape = rows, columns
        self.nbytes = sum(part.nbytes for kind, part in module.parts.items() if kind in _PARTS)

    def _bits_of(self, widths: Iterable[int]) -> int:
        """The bits of an integer, by the shape of the zeros: some modules may differ from the configuration.

        widths: those that are possible, the most likely one first.
        """
        rows, words = self._packed.shape[1], self._zeros.shape[1]
        for bits in widths:
            if packed_words(rows, bits) == words:
                return bits
        raise self._module.error("qzeros", f"has {words} words a group, which does not fit {rows} rows")

    def check(self, name: str) -> None:
        """Raise CheckpointError for a group that does not exist."""
        self._groups()

    def _groups(self) -> npt.NDArray[np.int64]:
        """The group of each column."""
        if self._indices is None:
            return np.arange(self.shape[1]) // self._group_size
        groups = self._indices.stored_rows(0, self.shape[1], INDICES[self._indices.stored.dtype]).astype(np.int64)
        if groups.min() < 0 or groups.max() >= self._scales.shape[0]:
            raise self._module.error("g_idx", f"names a group that is not one of {self._scales.shape[0]}")
        return groups

    def load(self) -> Loaded:
        """See ColumnsTensor."""
        words, rows = self._packed.shape
        groups = self._groups()
        packed = self._packed.stored_rows(0, words, "<u4")
        stored = unpack(self._zeros.stored_rows(0, self._zeros.shape[0], "<u4"), self._bits, rows)
        zeros = (stored + np.uint8(self._stored_minus)) & np.uint8((1 << self._bits) - 1)
        scales = widen(self._scales.read(0, self._scales.shape[0]))
        return Loaded(packed, np.ascontiguousarray(zeros.T), np.ascontiguousarray(scales.T), groups)

    def integers(self, packed: npt.NDArray[np.uint32], first: int, count: int) -> npt.NDArray[np.uint8]:
        """See ColumnsTensor."""
        return unpack(packed[:, first : first + count].T, self._bits, self.shape[1])


@dataclass(frozen=True)
class Gptq:
    """`quantization_config` of a GPTQ checkpoint, or its quantize_config.json."""

    bits: int
    group_size: int
    """-1: all columns are one group."""
    format: str
    widths: tuple[int, ...] = BITS
    """Bits that some modules may have."""
    other_sizes: tuple[int, ...] = ()
    """Group sizes that some modules may have."""

    @property
    def description(self) -> str:
        return f"GPTQ, {self.bits} bits"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Gptq:
        """where: the checkpoint, for messages. CheckpointError for an impossible value or another layout."""
        bits, size = config.get("bits"), config.get("group_size", -1)
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        if config.get("is_marlin_format"):
            layout = "marlin"
        if type(bits) is not int:
            raise CheckpointError(f"{where}: GPTQ's bits are {quoted(bits)}, not a number")
        if bits not in BITS:
            raise UnreadableError(f"GPTQ, {bits} bits")
        if not isinstance(layout, str) or layout not in _STORED_MINUS:
            raise UnreadableError(f"GPTQ, {layout}")
        check_group_size(size, where)
        return cls(bits, size, layout)

    def dequantized(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """The checkpoint's tensors, its quantized matrices dequantized. CheckpointError for one that is incomplete."""
        recent = Recent[Loaded]()
        found: dict[str, SourceTensor] = {}
        for module in modules(stored):
            if _PARTS & module.parts.keys():
                found[module.weight] = GptqTensor(module, self, recent)
            found |= module.others(*_PARTS)
        return found
