"""Headers of safetensors files, read and written: the only parser and the only writer in this project.

The package `safetensors` is not sufficient. It does not report a tensor's offset in the file, which memory mapping and
reading by rows need (its maintainers advise parsing the header for that); it returns BF16 to PyTorch only, not to
NumPy; and it reads through a mapping, so that a file truncated while a conversion reads it kills the process (SIGBUS).
The tests compare this parser with the package's: both reject the same files, except for headers of more than 16 MB.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from npqwen.errors import CheckpointError
from npqwen.format.config import read_json
from npqwen.format.files import LARGEST_JSON, is_lfs_pointer, open_regular, read_json_text
from npqwen.wording import shortened, unreadable

ALIGNMENT = 64
"""Bytes, a cache line: the data of files written here starts at a multiple of it."""

INDEX = "model.safetensors.index.json"
"""The file that names the shard of every tensor."""

_INDEX_BYTES, _INDEX_VALUES = 64_000_000, 600_000
"""Bytes and values up to which an index is read. That of Qwen3-Next-80B-A3B, whose 73,728 matrices of experts have four
parts each in GPTQ and with compressed-tensors, has 29 MB and 300,000 values."""

DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element of the dtypes whose sizes are checked."""

_MAX_DIMENSIONS = 16
_VALUES = 1_000_000  # 8 or more of each tensor; a file of all experts of Qwen3-235B-A22B in FP8 would have 75,000


class HeaderError(ValueError):
    """What is wrong with a file, as a clause for the caller's message."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes at `offset` from the file's beginning, row by row."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says about its tensors."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    file_bytes: int


def read_header(file: BinaryIO) -> Header:
    """Read the header of an open file, at its beginning.

    Every tensor lies within the file and has the size that its dtype and shape imply; together they fill the data
    without holes or overlaps. Raises HeaderError otherwise. Unknown dtypes are left to the caller.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_read(file, 8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, LARGEST_JSON):
        raise HeaderError(f"its header would be {length} bytes long, the file is {size}")
    try:
        entries = read_json_text(_read(file, length), _VALUES)
    except (ValueError, RecursionError):
        raise HeaderError("its header is not JSON, or too large") from None
    if not isinstance(entries, dict):
        raise HeaderError("its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("its __metadata__ is not an object of strings")
    tensors = {name: _tensor(name, entry, 8 + length, size) for name, entry in entries.items()}
    _check_filled(tensors, 8 + length, size)
    return Header(tensors, metadata, size)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file of a checkpoint; CheckpointError if it is missing or damaged."""
    try:
        with open_regular(path) as file:
            return read_header(file).tensors
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, a shard that {INDEX} names; download it again") from None
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    except HeaderError as error:
        if is_lfs_pointer(path):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`") from None
        raise CheckpointError(f"{path} is damaged or truncated: {error}; download it again") from None


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPE_BYTES[dtype]


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file, up to the data, padded so that the data starts at a multiple of ALIGNMENT.

    tensors: name, dtype and shape of each, in the order of their data, which follows without gaps.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_index(path: Path) -> dict[str, str]:
    """The weight map of a model in shards: tensor names to names of files beside the index.

    Raises CheckpointError for a damaged index, or one that names anything but a file of its own directory.
    """
    weight_map = read_json(path, _INDEX_BYTES, _INDEX_VALUES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    for file in weight_map.values():
        if file in ("", ".", "..") or any(mark in file for mark in "/\\:\0") or len(file) > 255:
            raise CheckpointError(f"{path} names {shortened(repr(file))}, which is not a file name")
    return weight_map


def _tensor(name: str, entry: Any, start: int, size: int) -> StoredTensor:
    label = f"tensor {shortened(name)}"
    if not isinstance(entry, dict):
        raise HeaderError(f"{label} has no entry in the header")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _is_counts(shape, range(_MAX_DIMENSIONS + 1)) and _is_counts(offsets, (2,))):
        raise HeaderError(f"{label} has an impossible entry in the header")
    if not offsets[0] <= offsets[1] <= size - start:
        raise HeaderError(f"{label} would lie outside the file")
    nbytes = offsets[1] - offsets[0]
    if dtype in DTYPE_BYTES and nbytes != tensor_bytes(dtype, tuple(shape)):
        raise HeaderError(f"{label} has {nbytes} bytes, which is not the size of {dtype} {shape}")
    return StoredTensor(dtype, tuple(shape), start + offsets[0], nbytes)


def _is_counts(value: Any, lengths: Container[int]) -> TypeGuard[list[int]]:
    """Whether a value is a list of integers that may count bytes or elements."""
    return isinstance(value, list) and len(value) in lengths and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_filled(tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise HeaderError(f"tensor {shortened(name)} overlaps another one, or leaves a hole before it")
        end += tensor.nbytes
    if end != size:
        raise HeaderError(f"its tensors end at byte {end}, the file is {size} bytes long")


def _read(file: BinaryIO, count: int) -> bytes:
    """Up to `count` bytes; fewer only at the end of the file."""
    data = bytearray()
    while len(data) < count and (part := file.read(count - len(data))):
        data += part
    return bytes(data)
