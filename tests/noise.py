"""A language model without weights that writes noise: random logits, the same after the same tokens."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray
from reciter import EOS, GREEDY, TOKENIZER, Reciter, RecitersCache

from npqwen.engine.kv_cache import KVCache
from npqwen.generation.sampling import Sampling

CLOSING = [id for id in range(len(TOKENIZER)) if TOKENIZER.token_bytes(id)[:1] in (b'"', b"]", b"}")] + [EOS]
"""Tokens that are made likely, for texts that end."""


class Noise(Reciter):
    """Draws from logits that depend on nothing but the tokens before. begins: texts that its answers begin with."""

    def __init__(
        self, *begins: str, template: str = "hybrid", context: int = 2048, sampling: Sampling = GREEDY, seed: int = 0
    ) -> None:
        super().__init__(*begins, template=template, context=context, sampling=sampling)
        self._seed = seed

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        logits = super().forward(ids, cache, all_logits=all_logits, out=out)
        assert isinstance(cache, RecitersCache)
        for back, row in enumerate(logits[::-1]):
            before = cache.ids[: cache.length - back]
            if len(before) - self._start >= len(self._script) - 1:  # nothing left to recite
                rng = np.random.default_rng((zlib.crc32(repr(before).encode()), self._seed))
                row[:] = 2 * rng.standard_normal(len(row), np.float32)
                row[CLOSING] += 5
        return logits
