"""Snapshots: a cache in a file, with its tokens and the fingerprint of its model.

The file is a valid safetensors file. `ids` is I32 (tokens,); `pending`, if there are any, are those that follow and
are not computed yet, such as the last sampled one. `page.0`, `page.1`, ... are F16 or F32 (layers, 2,
kv_heads, tiles, 16 * head_dim): for each layer the keys, then the values, in tiles of 16 positions. A tile of keys is
(head_dim, 16), one of values (16, head_dim). A page has 16 tiles, the last page as many as it needs; positions after
the last token are 0. Pages of int8 are U8 (layers, 2, kv_heads, tiles, bytes), in 8 tiles of 32 positions, which
npqwen/kernels/int8_page.py describes. A hybrid's `state.N` is the recurrent state after N tokens, F32 (layers, elements
of a layer's state): the one after all `ids`, and the checkpoints before it. `__metadata__` has the format, its version,
the model's fingerprint and, if the cache was computed with an adapter, the adapter's name and fingerprint.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npqwen.atomic_file import new_file
from npqwen.engine.cache_pages import clear_positions
from npqwen.engine.cache_type import CacheType
from npqwen.engine.kv_cache import KVCache
from npqwen.engine.recurrent_states import State
from npqwen.errors import ContextLengthError, FormatError, OutputError
from npqwen.format.files import fill, open_regular
from npqwen.format.layout import ceil_div
from npqwen.format.safetensors import HeaderError, make_header, read_header, tensor_bytes
from npqwen.kernels.cache_page import PAGE
from npqwen.wording import quoted, unreadable

if TYPE_CHECKING:
    from npqwen.engine.adapter import Adapter

FORMAT, VERSION = "npqwen-cache", "1"
_STATES = 3
"""Most states of a hybrid that are saved: the newest, to which the next turn of a conversation may be truncated."""
_STATE = re.compile(r"state\.[0-9]{1,10}", re.ASCII)
_TYPES: dict[str, CacheType] = {"U8": "int8", "F16": "f16", "F32": "f32"}
"""Types of caches, by the dtype of their pages."""


class _Adapter(NamedTuple):
    """The adapter that a file names."""

    name: str
    fingerprint: str


def save(path: Path, cache: KVCache, ids: list[int], fingerprint: str) -> None:
    """Write a cache and its tokens to a file, by atomic replacement. fingerprint: of its model.

    ids: the tokens in the cache, and perhaps some after them. Raises OutputError if the file cannot be written.
    """
    states = cache.states(cache.length)[-_STATES:]
    # Accepted draft tokens enter a state only in the next pass: they are saved as pending, and computed again.
    count = cache.length if cache.recurrent is None else states[-1].position if states else 0
    counts = count, len(ids) - count, [state.position for state in states]
    adapter = None if cache.adapter is None else _Adapter(cache.adapter.name, cache.adapter.fingerprint)
    header = _header(cache, *counts, fingerprint, adapter)
    size = len(header) + sum(tensor_bytes(dtype, shape) for _, dtype, shape in _tensors(cache, *counts))
    with cache.in_use, new_file(path) as file:
        free = shutil.disk_usage(os.path.dirname(file.name)).free
        if free < size:
            raise OutputError(f"{path} needs {size / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are free there")
        file.write(header)
        file.write(np.array(ids, "<i4").data)
        for page in _used(cache, count):
            file.write(page.reshape(-1).view(np.uint8).data)
        for state in states:
            file.write(state.array.data)


def size_of(cache: KVCache) -> int:
    """Approximate bytes that a cache takes in a file."""
    pages = sum(page.nbytes for page in cache.pages(cache.length))
    recurrent = cache.recurrent
    return pages if recurrent is None else pages + min(_STATES, len(recurrent.held)) * recurrent.shape.nbytes


def load(
    path: Path, cache: KVCache, fingerprint: str, vocab_size: int, adapters: Iterable[Adapter] = ()
) -> list[int]:
    """Fill an empty cache from a file; returns the `ids` that were passed to `save`.

    fingerprint, vocab_size, adapters: of its model. The cache gets the adapter that the file was computed with.

    Raises FormatError for a file that is damaged, not a snapshot, another model's or computed with another adapter,
    ContextLengthError if it holds more tokens than the cache may.
    """
    try:
        with open_regular(path) as file:
            return _read(path, file, cache, fingerprint, vocab_size, adapters)
    except OSError as error:
        raise FormatError(unreadable(path, error)) from None


def _read(
    path: Path, file: BinaryIO, cache: KVCache, fingerprint: str, vocab_size: int, adapters: Iterable[Adapter]
) -> list[int]:
    damaged = FormatError(f"{path} is truncated or not a saved session; save it again")
    try:
        header = read_header(file)
    except HeaderError:
        raise damaged from None
    if header.metadata.get("format") != FORMAT:
        raise FormatError(f"{path} is not a saved session")
    version = header.metadata.get("format_version")
    if version != VERSION:
        raise FormatError(f"{path} has format version {quoted(version)}; this npqwen reads {VERSION}; upgrade npqwen")
    pages = header.tensors.get("page.0")
    stored_type = None if pages is None else _TYPES.get(pages.dtype)
    if stored_type is not None and stored_type != cache.kv:
        raise FormatError(
            f"{path} has keys and values in {stored_type}, but this model uses {cache.kv}; load it with "
            f"kv={stored_type!r} (--kv {stored_type})"
        )
    if header.metadata.get("fingerprint") != fingerprint:
        raise FormatError(f"{path} is of another model, other weights or another YaRN factor; start a new session")
    adapter = None
    if "adapter" in header.metadata or "adapter_fingerprint" in header.metadata:
        adapter = _Adapter(header.metadata.get("adapter", ""), header.metadata.get("adapter_fingerprint", ""))
        cache.adapter = next((other for other in adapters if other.fingerprint == adapter.fingerprint), None)
        if cache.adapter is None:
            raise FormatError(
                f"{path} was computed with the adapter {quoted(adapter.name)}, which this model lacks; load the model "
                "with that adapter"
            )
    stored, rest = header.tensors.get("ids"), header.tensors.get("pending")
    if stored is None or any(
        tensor is not None and (len(tensor.shape) != 1 or tensor.shape[0] >= 2**31) for tensor in (stored, rest)
    ):
        raise damaged
    count, pending = stored.shape[0], 0 if rest is None else rest.shape[0]
    if count + pending > cache.limit:
        raise ContextLengthError(
            f"{path} holds {count + pending} tokens and the context is {cache.limit}; "
            "load the model with a longer context"
        )
    # The numbers of tokens and the states' positions determine the header.
    positions = [int(name[6:]) for name in header.tensors if _STATE.fullmatch(name)]
    if len(positions) > _STATES or (positions[-1:] != [count] if cache.recurrent and count else positions):
        raise damaged
    if positions != sorted(set(positions)) or 0 in positions:
        raise damaged
    expected = _header(cache, count, pending, positions, fingerprint, adapter)
    file.seek(0)
    if file.read(len(expected)) != expected:
        raise damaged
    ids = np.frombuffer(file.read(4 * (count + pending)), "<i4")
    if ids.size != count + pending:
        raise damaged
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise damaged
    if count:
        cache.reserve(count)
    for page in cache.pages(count):
        whole = page if page.flags.c_contiguous else np.empty(page.shape, page.dtype)
        if fill(file, whole) != whole.nbytes:
            raise damaged
        page[...] = whole
    if cache.recurrent is not None:
        states = [State(position, cache.new_state()) for position in positions]
        for state in states:
            if fill(file, state.array) != state.array.nbytes:
                raise damaged
        cache.recurrent.replace(states)
    cache.length = count
    return list(map(int, ids))


def _tensors(
    cache: KVCache, count: int, pending: int, positions: Sequence[int]
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor of a snapshot of `count` tokens, and `pending` that are not computed.

    positions: of the states.
    """
    layers, two, heads, _, size = cache.page_shape
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("ids", "I32", (count,))]
    if pending:
        tensors.append(("pending", "I32", (pending,)))
    for start in range(0, count, PAGE):
        tiles = ceil_div(min(PAGE, count - start), cache.tile)
        tensors.append((f"page.{start // PAGE}", page_dtype(cache.kv), (layers, two, heads, tiles, size)))
    if cache.recurrent is not None:
        shape = cache.recurrent.shape
        tensors += [(f"state.{position}", "F32", (shape.layers, shape.state)) for position in positions]
    return tensors


def _header(
    cache: KVCache, count: int, pending: int, positions: Sequence[int], fingerprint: str, adapter: _Adapter | None
) -> bytes:
    """The file's first bytes, up to the data."""
    metadata = {"format": FORMAT, "format_version": VERSION, "fingerprint": fingerprint}
    if adapter is not None:
        metadata |= {"adapter": adapter.name, "adapter_fingerprint": adapter.fingerprint}
    return make_header(_tensors(cache, count, pending, positions), metadata)


def page_dtype(kv: CacheType) -> str:
    """The safetensors dtype of pages of this type."""
    return next(dtype for dtype, known in _TYPES.items() if known == kv)


def _used(cache: KVCache, count: int) -> Iterator[NDArray[Any]]:
    """The cache's first `count` tokens, page by page; positions after the last one are zeroed."""
    pages = cache.pages(count)
    past = count % cache.tile
    if past:
        pages[-1] = page = pages[-1].copy()
        clear_positions(page, past, cache.kv)
    yield from pages
