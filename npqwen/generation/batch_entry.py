"""A sequence in a batch, and the callbacks that receive its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from npqwen.format.layout import ceil_div
from npqwen.kernels.cache_page import PAGE

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache
    from npqwen.engine.prefix_page import Ids
    from npqwen.generation.sequence import Sequence

_ROOM = 256
"""Tokens of a text that must fit into memory before its sequence starts; further growth may preempt sequences."""


@dataclass(eq=False)
class Entry:
    """A sequence in the batch."""

    sequence: Sequence
    on_text: Callable[[str], None]
    """Called after every step with its text, perhaps ""."""
    on_end: Callable[[BaseException | None], None]
    """Called once, with the exception that ended the sequence early, or None."""
    arrived: float
    prompt: Ids
    lent: bool
    """Whether its cache belongs to a caller who uses it afterwards."""
    started: bool = False
    """Whether it has ever run; it may be waiting again."""

    @property
    def cache(self) -> KVCache:
        cache = self.sequence.cache
        assert cache is not None  # made when the sequence began to run
        return cache

    @property
    def pages(self) -> int:
        """How many pages its prompt and its text so far take, or the beginning of the text if that is more."""
        tokens = len(self.prompt) + max(_ROOM, len(self.sequence.decoding.ids))
        return ceil_div(min(tokens, self.sequence.capacity), PAGE)

    def release(self) -> None:
        """Drop the reference to the cache: a caller who keeps the text must not keep its keys and values in memory."""
        self.sequence.close()
        if not self.lent:
            self.sequence.cache = None

    def computed(self) -> Ids:
        """The tokens in the cache."""
        prompt, length = self.prompt, self.sequence.length
        if length <= len(prompt):
            return prompt[:length]
        return np.concatenate([prompt, np.array(self.sequence.decoding.ids[: length - len(prompt)], np.int32)])
