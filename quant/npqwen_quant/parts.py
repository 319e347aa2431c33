"""Quantized matrices as checkpoints store them: the tensors of a module, and integers packed into words."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.floats import DTYPES
from npqwen.wording import quoted, shortened
from npqwen_quant.tensors import PlainTensor

FLOATS = tuple(DTYPES)
WORDS = ("I32", "U32")
INDICES = {"I32": "<i4", "I64": "<i8"}

U8 = npt.NDArray[np.uint8]


class UnreadableError(Exception):
    """A quantized format, or a variant of one, that npqwen does not read. The message is its name."""


class Module:
    """The tensors that a layer consists of. Their full names are `name`, a dot and the name of a part."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts: dict[str, PlainTensor] = {}

    @property
    def weight(self) -> str:
        """The name of its weights in an unquantized checkpoint."""
        return self.name_of("weight")

    def name_of(self, kind: str) -> str:
        """The full name of a part."""
        return f"{self.name}.{kind}" if self.name else kind

    def others(self, *kinds: str) -> dict[str, PlainTensor]:
        """All parts but these, by their full names."""
        return {self.name_of(kind): part for kind, part in self.parts.items() if kind not in kinds}

    def __contains__(self, part: str) -> bool:
        return part in self.parts

    def part(self, kind: str, dtypes: Container[str], dimensions: Iterable[int] = (2,)) -> PlainTensor:
        """The tensor of a part; CheckpointError if it is missing or empty, or of another dtype or dimensionality."""
        tensor = self.parts.get(kind)
        if tensor is None:
            other = next(iter(self.parts.values()))
            raise CheckpointError(
                f"{other.path} has no {shortened(self.name_of(kind))}, though the layer is quantized; "
                "is the download complete?"
            )
        if tensor.stored.dtype not in dtypes:
            raise self.error(kind, f"is stored as {shortened(tensor.stored.dtype)}, which this format does not have")
        if len(tensor.shape) not in dimensions or 0 in tensor.shape:
            raise self.error(kind, f"has the shape {list(tensor.shape)}, which this format does not have")
        return tensor

    def check_shape(self, kind: str, expected: tuple[int, ...]) -> None:
        """Raise CheckpointError for a part of another shape."""
        if self.parts[kind].shape != expected:
            raise self.error(
                kind, f"has shape {list(self.parts[kind].shape)}, but other parts of the layer need {list(expected)}"
            )

    def error(self, kind: str, problem: str) -> CheckpointError:
        """The error about a part; problem: a clause."""
        return CheckpointError(f"{self.parts[kind].path}: {shortened(self.name_of(kind))} {problem}")


def module_and_part(name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and the name of the part: the last word, or, as bitsandbytes names what
    belongs to a weight, "weight." and all that follows."""
    module, dot, of_weight = name.rpartition(".weight.")
    if dot:
        return module, f"weight.{of_weight}"
    module, _, kind = name.rpartition(".")
    return module, kind


def modules(stored: Mapping[str, PlainTensor]) -> Iterable[Module]:
    """The modules of a checkpoint's tensors."""
    found: dict[str, Module] = {}
    for name, tensor in stored.items():
        module, kind = module_and_part(name)
        found.setdefault(module, Module(module)).parts[kind] = tensor
    return found.values()


def check_group_size(size: Any, where: str) -> None:
    """Raise CheckpointError unless the number of columns that share a scale is positive, or -1 for all columns."""
    if type(size) is not int or not (size == -1 or 0 < size < 1 << 31):
        raise CheckpointError(f"{where}: group_size is {quoted(size)}, not the number of columns of a group")


def fitting_size(columns: int, groups: int, sizes: Iterable[int]) -> int:
    """The first of the group sizes, -1 for all columns, by which `columns` have this many groups; the first if none."""
    whole = [columns if size == -1 else size for size in sizes]
    return next((size for size in whole if -(-columns // size) == groups), whole[0])


def unpack(words: npt.NDArray[Any], bits: int, count: int) -> U8:
    """Integers of 2 to 8 bits, packed one after the other starting at the first word's lowest bit, also across words.

    words: (..., n), of 32 bits, little-endian. Returns (..., count).
    """
    data: U8 = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data[..., :count]
    missing = -data.shape[-1] % bits
    if missing:
        data = np.concatenate([data, np.zeros((*data.shape[:-1], missing), np.uint8)], -1)
    # Eight integers take `bits` bytes.
    groups = data.reshape(*data.shape[:-1], -1, bits)
    out = np.empty((*groups.shape[:-1], 8), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        low = groups[..., byte] >> np.uint8(shift)
        if shift + bits > 8:
            low |= groups[..., byte + 1] << np.uint8(8 - shift)
        np.bitwise_and(low, mask, out=out[..., i])
    return out.reshape(*out.shape[:-2], -1)[..., :count]


def packed_words(count: int, bits: int) -> int:
    """Words that `count` packed integers take."""
    return -(-count * bits // 32)
