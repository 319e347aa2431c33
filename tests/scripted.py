"""A model that says what it is told, token by token, for tests of the generation loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from checkpoints import TINY

from npqwen.generation.generation_config import GenerationConfig
from npqwen.generation.sampling import Sampling
from npqwen.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_directory(TINY)


class Scripted:
    """Interface of `npqwen.model.Model`; the likeliest next token is always the next one of `script`, then eos.

    calls: how many tokens each pass ran. seen: all of them.
    """

    def __init__(self, script: list[int], context: int = 1000) -> None:
        self.tokenizer = TOKENIZER
        self.script = [*script, 4098]
        self.context = context
        self.path = TINY
        self.config = SimpleNamespace(vocab_size=4128, max_position_embeddings=2048)
        self.generation_config = GenerationConfig(frozenset({4098}), Sampling(temperature=0))
        self.calls: list[int] = []
        self.seen: list[int] = []

    def new_cache(self, room: int | None = None) -> SimpleNamespace:
        assert room is not None
        assert room <= self.context
        self.room = room
        return SimpleNamespace(length=0, limit=room)

    def forward(self, ids: np.ndarray, cache: SimpleNamespace, out: Any = None) -> np.ndarray:
        assert ids.dtype == np.int32
        self.seen += ids.tolist()
        cache.length += len(ids)
        assert cache.length <= self.room
        logits = np.zeros((1, 4128), np.float32)
        logits[0, self.script[len(self.calls)]] = 1
        self.calls.append(len(ids))
        return logits

    def prefill(self, ids: np.ndarray, cache: SimpleNamespace, progress: Any = None) -> np.ndarray:
        if progress:
            progress(len(ids), len(ids))
        return self.forward(ids, cache)[0]


def recite(text: str, **options: Any) -> Any:
    """A model that says `text`."""
    return Scripted(TOKENIZER.encode(text), **options)
