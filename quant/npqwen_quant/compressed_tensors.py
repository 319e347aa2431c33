"""compressed-tensors (llm-compressor, Red Hat): integers or FP8 with a scale per matrix, row, group or block.

"pack-quantized": `weight_packed`, a row's integers packed one after the other into words, each with an offset of
2^(bits - 1); `weight_shape`; `weight_scale`, (rows, groups); perhaps `weight_zero_point`, packed like the weights but
along the rows (int8 in older files), and `weight_g_idx`, the group of each column.

"int-quantized", "float-quantized" and "naive-quantized": `weight` in int8 or e4m3, `weight_scale`, perhaps
`weight_zero_point` of its shape.

"nvfp4-pack-quantized": `weight_packed` in e2m1, `weight_scale` in e4m3, which is divided by `weight_global_scale`.
"mxfp4-pack-quantized": `weight_packed` in e2m1, `weight_scale` in e8m0. "mxfp8-quantized": `weight` in e4m3,
`weight_scale` in e8m0. See npqwen_quant/microscaling.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.floats import widen
from npqwen.wording import quoted
from npqwen_quant.fp8 import E8M0_TYPES, FP8, OF_ACTIVATIONS, block_size, blocks_of, check_matrix, scaled
from npqwen_quant.microscaling import MicroscaledTensor, scalar
from npqwen_quant.parts import FLOATS, INDICES, WORDS, Module, UnreadableError, modules, packed_words, unpack
from npqwen_quant.tensors import PlainTensor, SourceTensor

_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_VALUES = (FP8, "I8")
_PARTS = {
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "weight_global_scale",
}
_INTEGER_BITS = range(2, 9)
_MOST_GROUPS = 100
"""Most groups of config.json: the block sizes of all groups are tried for every matrix."""

F32 = npt.NDArray[np.float32]


class PackedTensor(SourceTensor):
    """A matrix of "pack-quantized"."""

    def __init__(self, module: Module, bits: tuple[int, ...]) -> None:
        """bits: the widths of this checkpoint's integers, one of which the matrix has. Raises CheckpointError for parts
        that are missing or do not fit together."""
        self._module = module
        self._packed = module.part("weight_packed", WORDS)
        self._scales = module.part("weight_scale", FLOATS)
        shape = module.part("weight_shape", INDICES, (1,))
        module.check_shape("weight_shape", (2,))
        rows, columns = (int(side) for side in shape.stored_rows(0, 2, INDICES[shape.stored.dtype]))
        stored_rows, words = self._packed.shape
        self._bits = next((one for one in bits if packed_words(columns, one) == words), 0)
        if rows != stored_rows or columns < 1 or not self._bits:
            raise module.error("weight_shape", f"is {rows} x {columns}, which does not fit weight_packed")
        groups = self._scales.shape[1]
        self._groups_of = module.part("weight_g_idx", INDICES, (1,)) if "weight_g_idx" in module else None
        module.check_shape("weight_scale", (rows, groups))
        if columns % groups:
            raise module.error("weight_scale", f"has {groups} groups, which do not fit {columns} columns")
        if self._groups_of is not None:
            module.check_shape("weight_g_idx", (columns,))
        self._zeros = module.part("weight_zero_point", (*WORDS, "I8")) if "weight_zero_point" in module else None
        if self._zeros is not None:
            packed_rows = rows if self._zeros.stored.dtype == "I8" else packed_words(rows, self._bits)
            module.check_shape("weight_zero_point", (packed_rows, groups))
        self.path = self._packed.path
        self.shape = rows, columns
        self.nbytes = sum(part.nbytes for kind, part in module.parts.items() if kind in _PARTS)

    def check(self, name: str) -> None:
        """Raise CheckpointError for a group that does not exist."""
        self._groups()

    def _groups(self) -> npt.NDArray[np.int64]:
        """The group of each column."""
        columns, count = self.shape[1], self._scales.shape[1]
        in_order = np.arange(columns) // (columns // count)
        if self._groups_of is None:
            return in_order
        groups = self._groups_of.stored_rows(0, columns, INDICES[self._groups_of.stored.dtype]).astype(np.int64)
        if (groups == -1).any():  # not initialized: in order
            return in_order
        if groups.min() < 0 or groups.max() >= count:
            raise self._module.error("weight_g_idx", f"names a group that is not one of {count}")
        return groups

    def read(self, first: int, count: int) -> F32:
        """See SourceTensor: float32."""
        values = unpack(self._packed.stored_rows(first, count, "<u4"), self._bits, self.shape[1]).astype(np.float32)
        groups = self._groups()
        if self._zeros is None:
            values -= np.float32(1 << self._bits - 1)
        else:
            values -= self._zero_points(first, count).take(groups, 1)
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
            values *= widen(self._scales.read(first, count)).take(groups, 1)
        return values

    def _zero_points(self, first: int, count: int) -> npt.NDArray[np.uint8]:
        """The zero points (count, groups) of some rows; 32 rows take whole words."""
        assert self._zeros is not None
        if self._zeros.stored.dtype == "I8":
            signed: npt.NDArray[np.uint8] = self._zeros.stored_rows(first, count, "i1").view(np.uint8)
            signed += np.uint8(1 << self._bits - 1)
            return signed
        start = first // 32
        word, stop = start * self._bits, packed_words(first + count, self._bits)
        words = self._zeros.stored_rows(word, stop - word, "<u4")
        zeros: npt.NDArray[np.uint8] = unpack(words.T, self._bits, first + count - start * 32).T
        return zeros[first - start * 32 :]


@dataclass(frozen=True)
class CompressedTensors:
    """`quantization_config` of a compressed-tensors checkpoint."""

    bits: tuple[int, ...]
    """Of packed integers."""
    blocks: tuple[tuple[int, int], ...]
    """Rows and columns of blocks that share a scale."""
    description: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> CompressedTensors:
        """where: the checkpoint, for messages. CheckpointError for an impossible value or another format."""
        groups = config.get("config_groups")
        if not isinstance(groups, dict):
            raise CheckpointError(f"{where}: config_groups is {quoted(groups)}, not an object of compressed-tensors")
        if len(groups) > _MOST_GROUPS:
            raise CheckpointError(f"{where}: config_groups has {len(groups):,} groups; npqwen reads {_MOST_GROUPS}")
        sparsity = config.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            raise UnreadableError(f"compressed-tensors, {sparsity.get('format')}")
        if config.get("transform_config"):
            raise UnreadableError("compressed-tensors with transforms")
        kinds: dict[str, int] = {}
        blocks: list[tuple[int, int]] = []
        for group in groups.values():
            if not isinstance(group, dict) or not isinstance(group.get("weights") or {}, dict):
                raise CheckpointError(f"{where}: config_groups has {quoted(group)}, which is not a group")
            weights = group.get("weights")
            if not weights:  # only activations are quantized
                continue
            layout = group.get("format") or config.get("format")
            if layout not in _FORMATS:
                raise UnreadableError(f"compressed-tensors, {layout}")
            bits, block = weights.get("num_bits", 8), weights.get("block_structure")
            if type(bits) is not int or bits not in _INTEGER_BITS:
                raise CheckpointError(f"{where}: num_bits is {quoted(bits)}; npqwen reads 2 to 8")
            kinds[f"{'FP' if weights.get('type') == 'float' else 'int'}{bits}"] = bits
            if block is not None:
                blocks.append(block_size(block, "block_structure", where))
        of_weights = " and ".join(kinds) or "nothing but activations"
        return cls(tuple(kinds.values()), tuple(blocks), f"compressed-tensors, {of_weights}")

    def dequantized(self, stored: Mapping[str, PlainTensor]) -> dict[str, SourceTensor]:
        """The checkpoint's tensors, its quantized matrices dequantized. CheckpointError for one that is incomplete."""
        found: dict[str, SourceTensor] = {}
        for module in modules(stored):
            weight = module.parts.get("weight")
            if weight is None and _PARTS & module.parts.keys():
                packed = module.parts.get("weight_packed")
                of_floats = packed is not None and packed.stored.dtype == "U8"
                found[module.weight] = packed_floats(module) if of_floats else PackedTensor(module, self.bits)
                found |= module.others(*_PARTS, *OF_ACTIVATIONS)
            elif weight is not None and ("weight_scale" in module or weight.stored.dtype in _VALUES):
                found[module.weight] = self._scaled(module)
                found |= module.others("weight", "weight_scale", "weight_zero_point", *OF_ACTIVATIONS)
            else:
                found |= module.others(*OF_ACTIVATIONS)
        return found

    def _scaled(self, module: Module) -> SourceTensor:
        """A matrix of int8 or e4m3."""
        weight = module.part("weight", _VALUES)
        scale = module.part("weight_scale", (*FLOATS, *E8M0_TYPES), range(3))
        if scale.stored.dtype in E8M0_TYPES:
            return MicroscaledTensor(module, "weight", "weight_scale", 8, "e8m0")
        shape = check_matrix(module.weight, weight)
        blocks: dict[tuple[int, ...], tuple[int, int]] = {blocks_of(shape, block): block for block in self.blocks}
        row = (1, shape[1])
        groups = scale.shape[-1] if scale.shape else 1
        if not shape[1] % groups:
            blocks.setdefault((shape[0], groups), (1, shape[1] // groups))
        for of_scales, block in (((), shape), ((1,), shape), ((1, 1), shape), ((shape[0],), row), ((shape[0], 1), row)):
            blocks.setdefault(of_scales, block)
        return scaled(module.weight, weight, scale, blocks, module.parts.get("weight_zero_point"))


def packed_floats(module: Module) -> MicroscaledTensor:
    """A matrix of "nvfp4-pack-quantized" or "mxfp4-pack-quantized"."""
    scale = module.part("weight_scale", (FP8, *E8M0_TYPES))
    if scale.stored.dtype != FP8:
        return MicroscaledTensor(module, "weight_packed", "weight_scale", 4, "e8m0")
    of_all = scalar(module, "weight_global_scale")
    return MicroscaledTensor(module, "weight_packed", "weight_scale", 4, "e4m3", divisor=of_all)
