"""A cache of recently used matrices, for threads that use different rows of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

_MOST = 3
"""Matrices that are always kept: those that concurrent steps use, gate, up and the beginning of the next matrix."""
_BYTES = 1 << 27


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Kept = TypeVar("Kept", bound=Sized)


class Recent(Generic[Kept]):
    """The last three matrices, or more if these fit in 128 MB. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[Hashable, Kept] = {}

    def get(self, key: Hashable, load: Callable[[], Kept]) -> Kept:
        """The matrix of a key, loaded if it is not in the cache."""
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                found = load()
            self._kept[key] = found  # the newest is the last
            while len(self._kept) > _MOST and sum(one.nbytes for one in self._kept.values()) > _BYTES:
                del self._kept[next(iter(self._kept))]
            return found
