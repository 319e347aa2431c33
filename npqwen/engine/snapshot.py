"""A cache in a file: tokens, and their keys and values as they lie in memory, tied to the model they came from.

The file is a valid safetensors file. `ids` is I32 (tokens,); `page.0`, `page.1`, ... are F16 or F32
(layers, 2, kv_heads, tiles, 16 * head_dim): for each layer the keys, then the values, of 16 positions a tile; a
tile of keys is (head_dim, 16 positions), one of values (16 positions, head_dim). A page has 16 tiles, the last one
as many as it needs; past the last token they hold 0. `__metadata__` has the format, its version and the model's
fingerprint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from npqwen.atomic_file import new_file
from npqwen.engine.kv_cache import KVCache
from npqwen.errors import ContextLengthError, FormatError, OutputError
from npqwen.kernels.attention import PAGE, TILE

FORMAT, VERSION = "npqwen-cache", "1"


def save(path: Path, cache: KVCache, ids: list[int], fingerprint: str) -> None:
    """Write `ids` and their keys and values; ids: one for each token in the cache. fingerprint: the model's.

    Raises OutputError if the file cannot be written.
    """
    header = _header(cache, len(ids), fingerprint)
    size = len(header) + sum(_bytes(entry) for name, entry in json.loads(header[8:]).items() if name != "__metadata__")
    with new_file(path) as file:
        free = shutil.disk_usage(os.path.dirname(file.name)).free
        if free < size:
            raise OutputError(f"{path} would take {size / 1e9:.2f} GB, but only {free / 1e9:.2f} GB is free there")
        file.write(header)
        file.write(np.array(ids, "<i4").data)
        for page in _used(cache):
            file.write(page.reshape(-1).view(np.uint8).data)


def load(path: Path, cache: KVCache, fingerprint: str, vocab_size: int) -> list[int]:
    """Fill an empty cache of the model with this fingerprint; returns the ids whose keys and values it then holds.

    Raises FormatError for a file that is damaged, no snapshot or another model's, ContextLengthError if it holds more
    tokens than the cache may.
    """
    try:
        with open(path, "rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size, cache, fingerprint, vocab_size)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None


def _read(
    path: Path, file: BinaryIO, size: int, cache: KVCache, fingerprint: str, vocab_size: int
) -> list[int]:
    head = file.read(8)
    length = int.from_bytes(head, "little")
    damaged = FormatError(f"{path} is truncated or no snapshot of a session; save it again")
    if len(head) < 8 or length > min(size - 8, 100_000_000):
        raise damaged
    text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header["__metadata__"]
        found, version, origin = (metadata.get(key) for key in ("format", "format_version", "fingerprint"))
        count = header["ids"]["shape"][0] if found == FORMAT else 0
        dtype = header["page.0"]["dtype"] if "page.0" in header else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    if found != FORMAT:
        raise FormatError(f"{path} is no snapshot of a session")
    if version != VERSION:
        raise FormatError(f"{path} has format version {version!r}, this npqwen reads {VERSION}; upgrade npqwen")
    if dtype in ("F16", "F32") and dtype != _dtype(cache):
        raise FormatError(f"{path} holds keys and values in {dtype}, this model's are {_dtype(cache)}")
    if origin != fingerprint:
        raise FormatError(f"{path} was saved from another model, or from other weights: start a new session")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 2**31:
        raise damaged
    if count > cache.limit:
        raise ContextLengthError(
            f"{path} holds {count} tokens, the context is {cache.limit}; load the model with a longer context"
        )
    # With so many tokens of this model, only one header is right.
    if head + text != _header(cache, count, fingerprint):
        raise damaged
    rest = size - 8 - length
    if rest != sum(_bytes(entry) for name, entry in header.items() if name != "__metadata__"):
        raise damaged
    ids = np.frombuffer(file.read(4 * count), "<i4")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise damaged
    if count:
        cache.reserve(count)
    for page in cache.pages(count):
        whole = page if page.flags.c_contiguous else np.empty(page.shape, page.dtype)
        if _fill(file, whole) != whole.nbytes:
            raise damaged
        page[...] = whole
    cache.length = count
    return list(map(int, ids))


def _header(cache: KVCache, count: int, fingerprint: str) -> bytes:
    """The file's first bytes for so many tokens; the data starts at a multiple of 64."""
    entries: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "format_version": VERSION, "fingerprint": fingerprint},
        "ids": {"dtype": "I32", "shape": [count], "data_offsets": [0, 4 * count]},
    }
    end = 4 * count
    for i in range(-(-count // PAGE)):
        layers, two, heads, _, size = cache.page_shape
        shape = [layers, two, heads, -(-min(PAGE, count - i * PAGE) // TILE), size]
        entry = {"dtype": _dtype(cache), "shape": shape}
        start, end = end, end + math.prod(shape) * cache.dtype_array.itemsize
        entries[f"page.{i}"] = entry | {"data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _bytes(entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end - start)


def _dtype(cache: KVCache) -> str:
    return "F16" if cache.dtype_array.itemsize == 2 else "F32"


def _used(cache: KVCache) -> Iterator[NDArray[Any]]:
    """What the cache holds, page by page; 0 after the last token, where forgotten ones may have left something."""
    pages = cache.pages(cache.length)
    past = cache.length % TILE
    if past:
        pages[-1] = page = pages[-1].copy()
        shape, dim = page.shape[:4], page.shape[4] // TILE
        page.reshape(*shape, dim, TILE)[:, 0, :, -1, :, past:] = 0
        page.reshape(*shape, TILE, dim)[:, 1, :, -1, past:] = 0
    yield from pages


def _fill(file: BinaryIO, page: NDArray[Any]) -> int:
    """Read a page; how many bytes there were."""
    rest = page.reshape(-1).view(np.uint8)
    while rest.size and (done := file.readinto(rest.data)):  # type: ignore[attr-defined]
        rest = rest[done:]
    return page.nbytes - rest.size
