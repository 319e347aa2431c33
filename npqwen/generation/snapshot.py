"""A cache in a file: tokens, and their keys and values as they lie in memory, tied to the model they came from.

The file is a valid safetensors file. `ids` is I32 (tokens,); `page.0`, `page.1`, ... are F16 or F32
(layers, 2, kv_heads, tiles, 16 * head_dim): for each layer the keys, then the values, of 16 positions a tile; a
tile of keys is (head_dim, 16 positions), one of values (16 positions, head_dim). A page has 16 tiles, the last one
as many as it needs; past the last token they hold 0. `__metadata__` has the format, its version and the model's
fingerprint.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import ContextLengthError, FormatError, OutputError
from npqwen.kernels.attention import PAGE, TILE

if TYPE_CHECKING:
    from npqwen.kv_cache import KVCache
    from npqwen.model import Model

FORMAT, VERSION = "npqwen-cache", "1"
_ABANDONED = 3600
"""Seconds without a write after which a partial file was left by a process that was killed."""


def save(path: Path, model: Model, cache: KVCache, ids: list[int]) -> None:
    """Write `ids` and what the cache holds of them, one for each of its tokens."""
    header = _header(cache, len(ids), model.fingerprint)
    size = len(header) + sum(_bytes(entry) for name, entry in json.loads(header[8:]).items() if name != "__metadata__")
    path = path.absolute()
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:12]}")
    with _writing(path):
        if path.is_dir():
            raise OutputError(f"{path} is a directory; give the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise OutputError(
                f"{path} would take {size / 1e9:.2f} GB, but only {free / 1e9:.2f} GB is free there"
            )
        try:
            with open(partial, "wb", buffering=0) as file:
                _write(file, header)
                _write(file, np.array(ids, "<i4"))
                for page in _used(cache):
                    _write(file, page)
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        _sync_directory(path.parent)


def load(path: Path, model: Model) -> tuple[KVCache, list[int]]:
    """A cache with all that the file holds, and the ids it stands for."""
    try:
        with open(path, "rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size, model)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None


def _read(path: Path, file: BinaryIO, size: int, model: Model) -> tuple[KVCache, list[int]]:
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
    cache = model.new_cache()
    if dtype in ("F16", "F32") and dtype != _dtype(cache):
        raise FormatError(f"{path} holds keys and values in {dtype}, this model's are {_dtype(cache)}")
    if origin != model.fingerprint:
        raise FormatError(f"{path} was saved from another model, or from other weights: start a new session")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 2**31:
        raise damaged
    if count > model.context:
        raise ContextLengthError(
            f"{path} holds {count} tokens, the context is {model.context}; load the model with a longer context"
        )
    # With so many tokens of this model, only one header is right.
    if head + text != _header(cache, count, model.fingerprint):
        raise damaged
    rest = size - 8 - length
    if rest != sum(_bytes(entry) for name, entry in header.items() if name != "__metadata__"):
        raise damaged
    ids = np.frombuffer(file.read(4 * count), "<i4")
    if ids.size and not 0 <= ids.min() <= ids.max() < model.config.vocab_size:
        raise damaged
    if count:
        cache.reserve(count)
    for page in cache.pages(count):
        whole = page if page.flags.c_contiguous else np.empty(page.shape, page.dtype)
        if _fill(file, whole) != whole.nbytes:
            raise damaged
        page[...] = whole
    cache.length = count
    return cache, ids.tolist()


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
        start, end = end, end + math.prod(shape) * cache.like.itemsize
        entries[f"page.{i}"] = entry | {"data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _bytes(entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end - start)


def _dtype(cache: KVCache) -> str:
    return "F16" if cache.like.itemsize == 2 else "F32"


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


def _write(file: BinaryIO, data: bytes | NDArray[Any]) -> None:
    rest = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    while rest.size:
        rest = rest[file.write(rest.data) :]


def _fill(file: BinaryIO, page: NDArray[Any]) -> int:
    """Read a page; how many bytes there were."""
    rest = page.reshape(-1).view(np.uint8)
    while rest.size and (done := file.readinto(rest.data)):  # type: ignore[attr-defined]
        rest = rest[done:]
    return page.nbytes - rest.size


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path} does not fit: no room is left on the disk") from error
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _remove_abandoned(path: Path) -> None:
    """Remove what a process that was killed left of an earlier file of this name."""
    for entry in path.parent.iterdir():
        if entry.name.startswith(f".{path.name}.partial-"):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _ABANDONED:
                    entry.unlink()


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":  # directories cannot be opened there; NTFS journals renames itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
