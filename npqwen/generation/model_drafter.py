"""Drafts of a text's next tokens by a smaller model with the same tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import NpqwenError, OptionError
from npqwen.generation.draft_statistics import CATCH_UP, RECENT, DraftStatistics, DraftToken, enough_ids

if TYPE_CHECKING:
    from npqwen.engine.kv_cache import KVCache
    from npqwen.generation.token_model import TokenModel
    from npqwen.tokenizer import Tokenizer

_ADDED = 128
"""The most tokens by which two vocabularies may differ in size, as Qwen3's does from that of an earlier release."""
_PARTS = (1 / 4, 1 / 2)
"""Fractions of the vocabulary that may be enough, see `enough_ids`."""


class DraftModel(DraftStatistics):
    """A smaller model that drafts for a larger one, and statistics of its draft tokens over all texts."""

    def __init__(self, model: TokenModel, target: TokenModel) -> None:
        """Raises OptionError unless both have the same tokens."""
        check_tokens(model.name, model.tokenizer, target.name, target.tokenizer)
        super().__init__(model.weight_bytes / max(1, target.weight_bytes))
        self.model = model
        self.vocab_size = min(model.config.vocab_size, target.config.vocab_size)


def check_tokens(name: str, tokenizer: Tokenizer, target_name: str, target: Tokenizer) -> None:
    """Raise OptionError unless the draft model `name` has the tokens of the model that it is to draft for."""
    if not _alike(tokenizer.vocabulary, target.vocabulary):
        raise OptionError(
            f"the draft model {name} has other tokens than {target_name}; choose a smaller model of the same family"
        )


def _alike(a: dict[str, int], b: dict[str, int]) -> bool:
    """Whether two vocabularies have the same ids, except for some added tokens that one of them lacks."""
    return abs(len(a) - len(b)) <= _ADDED and all(b.get(token, id) == id for token, id in a.items())


class ModelDrafter:
    """The draft model's view of one text: its own KV cache, which lags behind while nothing is drafted."""

    def __init__(self, draft: DraftModel, ids: Sequence[int], salt: str = "") -> None:
        """ids: the prompt's. salt: of its cache."""
        self.draft = draft
        self._salt = salt
        self._ids = list(ids)
        self._cache: KVCache | None = None
        self._held: list[int] = []
        """The ids in the cache: the text's, then perhaps draft tokens."""
        self._agreed = 0
        """How many of them are known to be the text's."""
        self._logits: NDArray[np.float32] = np.empty((1, draft.model.config.vocab_size), np.float32)
        self._viewed = 0
        """The text's length when its part of the vocabulary was chosen."""
        self._failed = False

    @property
    def cache(self) -> KVCache | None:
        """Its keys and values; None while nothing is drafted."""
        return self._cache

    @property
    def statistics(self) -> DraftStatistics:
        """The statistics of the draft model's draft tokens."""
        return self.draft

    def extend(self, ids: Iterable[int]) -> None:
        """Append the text's next tokens, drawn or forced."""
        self._ids.extend(ids)

    def catch_up(self) -> bool:
        """Catch up with the text by at most one chunk, except for a few tokens that `next` runs.

        Returns whether drafting can start.
        """
        if self._failed:
            return False
        model = self.draft.model
        try:
            if self._cache is None:
                self._cache = model.new_cache()
                self._cache.salt = self._salt
                known = model.prefixes.extend(np.array(self._ids[:-1], np.int32), self._cache)
                self._held, self._agreed = self._ids[:known], known
            self._forget_rejected(self._cache)
            if len(self._ids) >= self._viewed + RECENT // 8 or not self._viewed:
                self._choose_vocabulary()
            missing = self._ids[len(self._held) : -1][: model.chunk]
            if len(missing) > CATCH_UP:
                self._run(missing)
        except NpqwenError:  # there is not enough memory, or the draft model's context is too short
            self.close()
            self._failed = True
            return False
        return len(self._ids) - len(self._held) <= CATCH_UP + 1

    def next(self, drafted: list[int]) -> DraftToken | None:
        """The likeliest token after the text and the tokens `drafted`; None if memory or context is too small."""
        start = time.perf_counter()
        known = len(self._held)
        missing = self._ids[known:] + drafted[max(0, known - len(self._ids)) :]
        try:
            self._run(missing)
        except NpqwenError:
            return None
        token = self.draft.best(self._logits[0, : self.draft.vocab_size])
        if len(missing) == 1:
            self.draft.add_seconds(time.perf_counter() - start)
        return token

    def close(self) -> None:
        """Keep the cache's tokens as a prefix for later texts, and free it."""
        cache, self._cache = self._cache, None
        if cache is not None:
            self._forget_rejected(cache)
            self.draft.model.prefixes.keep(np.array(self._held, np.int32), cache)
        self._held, self._agreed = [], 0

    def _run(self, ids: list[int]) -> None:
        assert self._cache is not None  # made by catch_up
        self.draft.model.forward(np.array(ids, np.int64), self._cache, out=self._logits)
        self._cache.keep_checkpoint()
        self._held += ids

    def _choose_vocabulary(self) -> None:
        """Choose how many ids' logits are computed, as the output matrix is a third of a small model."""
        self._viewed = len(self._ids)
        model = self.draft.model
        size = enough_ids(self._ids, model.tokenizer.added_ids, model.config.vocab_size, _PARTS)
        if size != self._logits.shape[1]:
            self._logits = np.empty((1, size), np.float32)

    def _forget_rejected(self, cache: KVCache) -> None:
        same, end = self._agreed, min(len(self._held), len(self._ids))
        while same < end and self._held[same] == self._ids[same]:
            same += 1
        # The last token is run again even if it was drafted: its logits are not kept.
        same = min(same, len(self._ids) - 1)
        same = cache.reusable(same)
        cache.truncate(same)
        del self._held[same:]
        self._agreed = same
