"""Texts that one caller wants read: of each, the final hidden state of its last token."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.prefix_page import SHARED, Ids, common_prefix

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache


@dataclass(eq=False)
class Text:
    """One text of some readings."""

    readings: Readings
    index: int
    ids: Ids
    ahead: int
    """Tokens that would be run until it is read, if its readings had the machine for themselves."""
    cache: KVCache | None = None
    """Of the tokens that were run; None until it begins."""

    @property
    def left(self) -> int:
        """How many tokens were not run yet."""
        return len(self.ids) - (0 if self.cache is None else self.cache.length)


@dataclass(eq=False)
class Readings:
    """Texts that are read together, and what came out.

    texts: token ids, none of them empty. hidden_size: of the model. on_end: called once, with what ended them early, if
    something did. on_read: called with the number of texts that are read, and of all, after each.
    """

    texts: Sequence[Ids]
    hidden_size: int
    on_end: Callable[[BaseException | None], None]
    on_read: Callable[[int, int], object] | None = None
    states: NDArray[np.float32] = field(init=False)
    """(texts, hidden_size): the final norm's output of each text's last token, once it is read."""
    common: int = field(init=False)
    """Tokens with which all texts begin, and which are computed once."""
    cached: int = 0
    """Tokens that need not be run, as others have run them."""
    done: int = 0
    """How many texts are read."""
    cancelled: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    waiting: deque[Text] = field(init=False)
    running: list[Text] = field(default_factory=list)
    free: list[KVCache] = field(default_factory=list)
    """Caches of the first `common` tokens, for texts to come."""
    known: bool = False
    """Whether the pool of prefixes has those tokens, too."""

    def __post_init__(self) -> None:
        self.states = np.empty((len(self.texts), self.hidden_size), np.float32)
        self.common = _common(self.texts)
        ends = np.cumsum([len(ids) - (self.common if at else 0) for at, ids in enumerate(self.texts)])
        self.waiting = deque(Text(self, at, ids, int(ends[at])) for at, ids in enumerate(self.texts))

    @property
    def begun(self) -> bool:
        """Whether a text was begun."""
        return len(self.waiting) < len(self.texts)

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))


def _common(texts: Sequence[Ids]) -> int:
    """How many tokens all of several texts begin with, if they are worth sharing. The last token is always run."""
    if len(texts) < 2:
        return 0
    shared = min(map(len, texts)) - 1
    for ids in texts[1:]:
        if shared < SHARED:
            return 0
        shared = common_prefix(texts[0][:shared], ids[:shared])
    return shared if shared >= SHARED else 0
