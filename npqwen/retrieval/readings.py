"""Texts that one caller wants read, that is, the final hidden state of each text's last token."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.prefix_page import MIN_PREFIX, Ids, common_prefix

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache


@dataclass(eq=False)
class Text:
    """One text of some readings."""

    readings: Readings
    index: int
    ids: Ids
    ahead: int
    """Tokens to run until the text is read, if its readings ran alone."""
    cache: KVCache | None = None
    """Holds the tokens that were run; None until the text starts."""

    @property
    def left(self) -> int:
        """How many tokens were not run yet."""
        return len(self.ids) - (0 if self.cache is None else self.cache.length)


@dataclass(eq=False)
class Readings:
    """Texts that are read together, and their states.

    texts: token ids, none of them empty. hidden_size: of the model. on_end: called once, with the exception that ended
    them early, or None. on_read(done, total): called after each text, with numbers of texts. salt: only texts with the
    same one share prefixes.
    """

    texts: Sequence[Ids]
    hidden_size: int
    on_end: Callable[[BaseException | None], None]
    on_read: Callable[[int, int], object] | None = None
    salt: str = ""
    states: NDArray[np.float32] = field(init=False)
    """(texts, hidden_size): the final norm's output of each text's last token, once it is read."""
    common: int = field(init=False)
    """The length of the prefix that all texts share and that is computed once; 0 if there is none."""
    cached: int = 0
    """Tokens that are not run, as they were in a cache or the pool of prefixes."""
    done: int = 0
    """How many texts are read."""
    cancelled: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    waiting: deque[Text] = field(init=False)
    running: list[Text] = field(default_factory=list)
    free: list[KVCache] = field(default_factory=list)
    """Caches of the first `common` tokens, for later texts."""
    known: bool = False
    """Whether the pool of prefixes has those tokens, too."""

    def __post_init__(self) -> None:
        self.states = np.empty((len(self.texts), self.hidden_size), np.float32)
        self.common = _common(self.texts)
        ends = np.cumsum([len(ids) - (self.common if at else 0) for at, ids in enumerate(self.texts)])
        self.waiting = deque(Text(self, at, ids, int(ends[at])) for at, ids in enumerate(self.texts))

    @property
    def begun(self) -> bool:
        """Whether any text has started."""
        return len(self.waiting) < len(self.texts)

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))


def _common(texts: Sequence[Ids]) -> int:
    """The length of several texts' common prefix; 0 if it is too short to share. The last token is always run."""
    if len(texts) < 2:
        return 0
    shared = min(map(len, texts)) - 1
    for ids in texts[1:]:
        if shared < MIN_PREFIX:
            return 0
        shared = common_prefix(texts[0][:shared], ids[:shared])
    return shared if shared >= MIN_PREFIX else 0
