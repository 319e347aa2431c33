"""Pieces: the tokens of each sequence that one forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.kv_cache import KVCache
from npqwen.errors import OptionError


class Piece(NamedTuple):
    """The tokens of one sequence that one pass runs."""

    ids: NDArray[np.int64]
    """The tokens after those in the cache, (tokens,)."""
    cache: KVCache
    """With room for them, see `KVCache.reserve`; the tokens are appended to it."""
    rows: int
    """For how many of the last tokens logits are computed."""
    draft_tokens: int = 0
    """How many of the last tokens are draft tokens, which `KVCache.retract` may remove afterwards."""


def last_tokens(pieces: Sequence[Piece]) -> NDArray[np.int64]:
    """The indices, within the pass, of the tokens whose logits are computed."""
    ends = accumulate(piece.ids.size for piece in pieces)
    ranges = (range(end - piece.rows, end) for piece, end in zip(pieces, ends, strict=True))
    return np.array(list(chain.from_iterable(ranges)), np.int64)


def check_pieces(pieces: Sequence[Piece], chunk: int, vocab_size: int) -> None:
    """Raise OptionError unless a pass of at most `chunk` tokens can run all of them, and all ids are below
    `vocab_size`."""
    if len({id(piece.cache) for piece in pieces}) < len(pieces):
        raise OptionError("two pieces of a pass have the same cache; each sequence needs its own, such as a fork")
    tokens = sum(piece.ids.size for piece in pieces)
    if not 0 < tokens <= chunk or not all(piece.ids.size for piece in pieces):
        raise OptionError(f"a pass takes 1 to {chunk} tokens, at least one of each sequence; these are {tokens}")
    for ids, _, rows, _ in pieces:
        if ids.dtype != np.int64 or ids.ndim != 1 or not 0 <= ids.min() <= ids.max() < vocab_size:
            raise OptionError(f"a piece's ids must be int64, from 0 to {vocab_size - 1}")
        if not 0 <= rows <= ids.size:
            raise OptionError(f"rows is {rows} for a piece of {ids.size} tokens; it must be 0 to {ids.size}")


@contextmanager
def caches_in_use(pieces: Sequence[Piece]) -> Iterator[None]:
    """Hold the caches of all pieces; OptionError if another thread uses one of them."""
    with ExitStack() as in_use:
        for piece in pieces:
            in_use.enter_context(piece.cache.in_use)
        yield


def reserve(pieces: Sequence[Piece]) -> None:
    """Make room for a pass over these pieces in their caches, where there is none yet; see `KVCache.reserve`."""
    for piece in pieces:
        piece.cache.reserve(piece.ids.size)


def by_piece(values: NDArray[np.float32], pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
    """The rows of a pass's results that belong to each piece."""
    ends = accumulate(piece.rows for piece in pieces)
    return [values[end - piece.rows : end] for piece, end in zip(pieces, ends, strict=True)]
