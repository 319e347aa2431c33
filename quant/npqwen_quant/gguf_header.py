"""The header of a GGUF file: its metadata, and where its tensors lie.

The package `gguf` is not used: it makes a NumPy array of every string (a vocabulary of 151,936 tokens took 33 s and
490 MB; 0.15 s and 30 MB here), it reads through a memory mapping, so that a file truncated while it is read kills the
process (SIGBUS), and it depends on requests and PyYAML. Files that ggml rejects are rejected here, too.

Layout (ggml/docs/gguf.md), little-endian: "GGUF", version u32, tensors u64, entries u64; an entry is a key, a type u32
and a value; a tensor is a name, the number of dimensions u32, that many sizes u64 (row length first), a type u32 and an
offset u64 from the data's start, which is the header's end rounded up to the alignment. A string is a length u64 and
bytes; an array is a type u32, a length u64 and values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from npqwen.errors import CheckpointError
from npqwen.format.files import open_regular
from npqwen.wording import quoted, shortened, unreadable
from npqwen_quant.gguf_types import TYPES, GgmlType, type_name

MAGIC = b"GGUF"
ARCHITECTURE = "general.architecture"

_POINTER = b"version https://git-lfs"
_VERSIONS = (2, 3)
_LONGEST = 1 << 26
"""Most bytes of a header. Those of Qwen3 have 6 MB."""
_ITEMS = 1 << 20
"""Most values in all arrays of a header together. Qwen3's has 455,259: tokens, their types and merges."""
_ENTRIES, _TENSORS = 1 << 16, 1 << 16
"""Most metadata entries and most tensors of a file. Qwen3-235B-A22B has some 1,100 tensors."""
_DIMENSIONS = 4
_BYTES = 1 << 18
"""Bytes of a header that are read at a time."""

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""NumPy dtypes of values, by GGUF's type numbers."""
_STRING, _ARRAY = 8, 9

Value = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]


@dataclass(frozen=True)
class StoredGguf:
    """Where a tensor lies: `nbytes` bytes at `offset` from the file's beginning. shape: row length last."""

    kind: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The metadata and the tensors of one file."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, StoredGguf]


class _Damaged(ValueError):
    """A damaged file. The message is a clause that says what is wrong."""


def is_gguf(path: Path) -> bool:
    """Whether this is a regular file that begins with GGUF's magic number. Files in ollama's cache have no suffix."""
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> GgufHeader:
    """Read the header of a file.

    All tensors of the result lie within the file and do not overlap. Raises CheckpointError for a file that cannot be
    read, is damaged or truncated, or has a tensor of an unsupported type.
    """
    try:
        with open_regular(path) as file:
            reader = _Reader(file, path)
            count, entries = reader.start()
            metadata = dict(reader.entries(entries))
            found = reader.tensors(count)
            return GgufHeader(path, metadata, _located(path, found, metadata, reader))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None
    except _Damaged as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}; download it again") from None


def read_architecture(path: Path) -> str | None:
    """The architecture that a file names, without reading all of its header; None if it cannot be read."""
    try:
        with open_regular(path) as file:
            reader = _Reader(file, path)
            _, entries = reader.start()
            for key, value in reader.entries(entries):
                if key == ARCHITECTURE:
                    return value if isinstance(value, str) else None
    except (OSError, _Damaged, CheckpointError):
        pass
    return None


class _Reader:
    """Reads a header from the beginning.

    Counts in the file are not trusted: memory is allocated only for data that is there.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.file_bytes = file.seek(0, 2)
        file.seek(0)
        self._data = b""
        self._at = 0
        self._before = 0
        """Bytes of the file before `_data`."""
        self._items = 0

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._before + self._at

    def start(self) -> tuple[int, int]:
        """The numbers of tensors and of entries."""
        found = self._take(min(len(_POINTER), self.file_bytes))
        if found.startswith(_POINTER):
            raise CheckpointError(f"{self._path} is a Git LFS pointer, not the file itself; run `git lfs pull` there")
        if found[: len(MAGIC)] != MAGIC:
            raise CheckpointError(f"{self._path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
        self._at = len(MAGIC)
        version = self._number("<I")
        if version & 0xFFFF == 0 and version:
            raise CheckpointError(f"{self._path} is big-endian, which npqwen does not read; use the little-endian file")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self._path} has GGUF version {version}, and npqwen reads {' and '.join(map(str, _VERSIONS))}; "
                "recreate it with a current llama.cpp"
            )
        tensors, entries = self._number("<Q"), self._number("<Q")
        if tensors > _TENSORS or entries > _ENTRIES:
            raise _Damaged(f"it has {tensors} tensors and {entries} entries of metadata")
        return tensors, entries

    def entries(self, count: int) -> Iterator[tuple[str, Value]]:
        """The entries of the metadata."""
        seen = set()
        for _ in range(count):
            key = self._string()
            if key in seen:
                raise _Damaged(f"{quoted(key)} appears twice")
            seen.add(key)
            yield key, self._value(key, self._number("<I"))

    def tensors(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """The shape, type number, and offset in the data of each tensor, by name."""
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string()
            if name in found:
                raise _Damaged(f"tensor {shortened(name)} appears twice")
            dimensions = self._number("<I")
            if not 0 < dimensions <= _DIMENSIONS:
                raise _Damaged(f"tensor {shortened(name)} has {dimensions} dimensions")
            shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))[::-1]
            if not all(shape):
                raise _Damaged(f"tensor {shortened(name)} has no elements")
            found[name] = shape, self._number("<I"), self._number("<Q")
        return found

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            found: Value = self._numbers(key, kind, 1)[0]
            return found
        kind, count = self._number("<I"), self._number("<Q")
        self._items += count
        if self._items > _ITEMS:
            raise _Damaged(f"{shortened(key)} has {count} values")
        if kind != _STRING:
            return self._numbers(key, kind, count)
        return [self._string() for _ in range(count)]

    def _numbers(self, key: str, kind: int, count: int) -> list[int] | list[float] | list[bool]:
        if kind not in _SCALARS:
            raise _Damaged(f"{shortened(key)} has values of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        if dtype == np.bool_:
            return [byte != 0 for byte in self._take(count)]
        values = np.frombuffer(self._take(count * dtype.itemsize), dtype)
        # The shortest decimal that rounds to a float32 is what was meant: 1e-06, not 9.999999974752427e-07.
        return [float(str(values[0]))] if dtype == np.float32 and count == 1 else values.tolist()

    def _string(self) -> str:
        try:
            return self._take(self._number("<Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged("a string is not UTF-8") from None

    def _number(self, form: str) -> int:
        found: int = struct.unpack(form, self._take(8 if form == "<Q" else 4))[0]
        return found

    def _take(self, count: int) -> bytes:
        """The next bytes."""
        stop = self._at + count
        if stop > len(self._data):
            self._fill(count)
            stop = count
        part = self._data[self._at : stop]
        self._at = stop
        return part

    def _fill(self, count: int) -> None:
        """Buffer at least `count` bytes, starting at the current position."""
        if self.position + count > min(self.file_bytes, _LONGEST):
            raise _Damaged(
                f"its header has more than {_LONGEST >> 20} MB" if count <= self.file_bytes - self.position
                else f"it ends at byte {self.file_bytes}, inside its header"
            )
        self._before += self._at
        rest = [self._data[self._at :]]
        have = len(rest[0])
        while have < count:
            part = self._file.read(max(_BYTES, count - have))
            if not part:
                raise _Damaged("it became shorter while it was read")
            rest.append(part)
            have += len(part)
        self._data = b"".join(rest)
        self._at = 0


def _located(
    path: Path,
    found: dict[str, tuple[tuple[int, ...], int, int]],
    metadata: dict[str, Value],
    reader: _Reader,
) -> dict[str, StoredGguf]:
    """The tensors, checked to lie within the file without overlap."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment is {quoted(alignment)}, not a power of two")
    start = -(-reader.position // alignment) * alignment
    out = {}
    for name, (shape, number, offset) in found.items():
        kind = TYPES.get(number)
        if kind is None:
            raise CheckpointError(
                f"{path}: {shortened(name)} is stored as {type_name(number)}, which npqwen does not read; it reads "
                f"{', '.join(one.name for one in TYPES.values())}"
            )
        if shape[-1] % kind.weights:
            raise _Damaged(
                f"the rows of {shortened(name)}, of {shape[-1]} weights, are not a multiple of the block size of "
                f"{kind.name}"
            )
        nbytes = math.prod(shape) // kind.weights * kind.nbytes
        if offset % alignment:
            raise _Damaged(f"tensor {shortened(name)} is not aligned to {alignment} bytes")
        if start + offset + nbytes > reader.file_bytes:
            raise _Damaged(f"it has {reader.file_bytes} bytes, but {shortened(name)} ends at {start + offset + nbytes}")
        out[name] = StoredGguf(kind, shape, start + offset, nbytes)
    end = 0
    for name, tensor in sorted(out.items(), key=lambda one: one[1].offset):
        if tensor.offset < end:
            raise _Damaged(f"tensor {shortened(name)} overlaps another one")
        end = tensor.offset + tensor.nbytes
    return out
