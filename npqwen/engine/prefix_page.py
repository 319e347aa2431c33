"""A page of a prefix: its tokens, those before it, and the key under which others find it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npqwen.kernels.cache_page import PAGE

MIN_PREFIX = 16
"""Fewest tokens of a common prefix worth reusing, or waiting for while another text computes them. Computing
fewer takes little time."""
_KEY_BYTES = 16

Ids = NDArray[np.int32]


def root_key(*facts: object) -> bytes:
    """The key before the first token. facts: what else the keys and values of a text depend on."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=_KEY_BYTES).digest()


Scope = tuple[object, ...]
"""What else than its ids decides which texts share a text's pages: see `scope_of`."""


def scope_of(fingerprint: object, salt: str) -> Scope:
    """The scope of texts with the adapter of this fingerprint, None for none, and with a salt; "": none."""
    if salt:
        return fingerprint, salt
    return () if fingerprint is None else (fingerprint,)


def key_after(parent: bytes, ids: Ids) -> bytes:
    """The key of the tokens with the key `parent` and `ids` after them."""
    return hashlib.blake2b(parent + ids.astype("<i4").tobytes(), digest_size=_KEY_BYTES).digest()


@dataclass(eq=False)
class PrefixPage:
    """Keys, values and recurrent states of PAGE tokens, or of fewer at the end of a text."""

    parent: bytes
    """The key of all tokens before the page."""
    ids: Ids
    array: NDArray[Any]
    """The positions of `ids` are never modified."""
    depth: int
    """How many pages come before it."""
    key: bytes = field(init=False)
    """Of all tokens up to the page's last."""
    used: int = 0
    """When it was last used, in nanoseconds since the epoch."""
    stored: int = 0
    """How many of its tokens are in a file or queued for writing."""
    replaces: bytes | None = None
    """The key of a file with fewer of its tokens, which is removed once this page is written."""
    states: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """A hybrid's recurrent states, by how many of the page's tokens come before them."""
    stored_states: frozenset[int] = frozenset()
    """Those that are in a file or queued for writing."""
    is_outdated: bool = False
    """Whether the page's file must be replaced, as it lacks some states."""

    def __post_init__(self) -> None:
        self.key = key_after(self.parent, self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states."""
        return self.array.nbytes + sum(state.nbytes for state in self.states.values())

    @property
    def is_full(self) -> bool:
        """Whether other pages may follow."""
        return len(self.ids) == PAGE

    @property
    def branch(self) -> tuple[bytes, bytes]:
        """Equal for pages after the same tokens that have their first MIN_PREFIX tokens in common."""
        return branch_of(self.parent, self.ids)


def branch_of(parent: bytes, ids: Ids) -> tuple[bytes, bytes]:
    """See `PrefixPage.branch`."""
    return parent, ids[:MIN_PREFIX].tobytes()


def common_prefix(a: Sequence[int] | Ids, b: Sequence[int] | Ids) -> int:
    """The length of the longest common prefix of two texts, in tokens."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:size], np.int32) != np.asarray(b[:size], np.int32))
    return int(differ[0]) if len(differ) else size
