"""Drafts of a text's next tokens by the checkpoint's own draft layer (multi-token prediction).

The layer takes the hidden state of a token and the next token, and returns a hidden state from which the output matrix
computes the logits of the token after that. Further draft tokens take the layer's own state in place of the model's.

Checkpoints do not say whether the layer was trained on states before or after the final norm, and implementations
differ. So both are tried, and the kind whose drafts are accepted more often is kept. A wrong choice costs speed only:
drafts do not change texts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.hidden_tail import KEPT, HiddenTail
from npqwen.errors import NpqwenError
from npqwen.generation.draft_statistics import CATCH_UP, DraftStatistics, DraftToken
from npqwen.generation.draft_vocabulary import DraftVocabulary

if TYPE_CHECKING:
    from npqwen.engine.draft_layer import DraftLayer
    from npqwen.engine.kv_cache import KVCache
    from npqwen.format.config import Config
    from npqwen.tokenizer import Tokenizer

_TRIED = 32
"""Draft tokens with each kind of state before one kind is chosen."""
_TURN = 8
"""Until then, the kind of state alternates after this many draft tokens."""


class DraftingModel(Protocol):
    """A model with a draft layer."""

    @property
    def config(self) -> Config:
        """The dimensions, from config.json."""

    @property
    def tokenizer(self) -> Tokenizer:
        """From tokenizer.json."""

    @property
    def draft_layer(self) -> DraftLayer | None:
        """The checkpoint's draft layer."""


class LayerStatistics:
    """Statistics of the draft tokens of a model's draft layer, over all texts."""

    def __init__(self, model: DraftingModel) -> None:
        """model: one that has a draft layer."""
        assert model.draft_layer is not None
        self.layer, self.config, self.added_ids = model.draft_layer, model.config, model.tokenizer.added_ids
        self.by_state = DraftStatistics(self.layer.share), DraftStatistics(self.layer.share)
        """From states before the final norm, and after it."""

    @property
    def normed(self) -> bool:
        """Whether the next draft token is made from states after the final norm."""
        before, after = self.by_state
        tries = [one.decided + one.passed_over for one in self.by_state]
        if min(tries) < _TRIED:
            return tries[0] // _TURN > tries[1] // _TURN
        return after.accepted * (before.decided + 1) > before.accepted * (after.decided + 1)


class LayerDrafter:
    """The draft layer's view of one text: its own KV cache, which lags behind while nothing is drafted.

    Each token in the cache was run with the state of the previous one. When drafting starts, the first is at most
    `KEPT` tokens before the latest: of earlier ones the layer knows only what the states contain.
    """

    def __init__(self, layer: LayerStatistics, ids: Sequence[int]) -> None:
        """ids: the prompt's."""
        self._layer = layer
        self._ids = list(ids)
        self._text: KVCache | None = None
        self._tail = HiddenTail(layer.config.hidden_size)
        self._cache: KVCache | None = None
        self._first = self._held = 0
        """Positions in the text: the cache holds the tokens from `_first` + 1 to `_held`, then perhaps draft tokens."""
        self._normed = False
        self._own = np.empty(0, np.float32)
        """The layer's state that gave the last draft token."""
        self._vocabulary = DraftVocabulary(layer.config.vocab_size, layer.added_ids)
        self._failed = False

    @property
    def cache(self) -> KVCache | None:
        """Its keys and values; None while nothing is drafted."""
        return self._cache

    @property
    def statistics(self) -> DraftStatistics:
        """The statistics of draft tokens from the kind of state that is used next."""
        return self._layer.by_state[self._layer.normed]

    def follow(self, cache: KVCache) -> None:
        """Collect the hidden states of the text's passes, which use this KV cache from now on."""
        self.leave()
        self._text, self._tail = cache, HiddenTail(self._layer.config.hidden_size)
        cache.tail = self._tail

    def leave(self) -> None:
        """Stop collecting hidden states, and free the draft layer's own KV cache."""
        if self._text is not None and self._text.tail is self._tail:
            self._text.tail = None
        self._text = self._cache = None

    def extend(self, ids: Iterable[int]) -> None:
        """Append the text's next tokens, drawn or forced."""
        self._ids.extend(ids)

    def catch_up(self) -> bool:
        """Catch up with the text, except for a few tokens that `next` runs; returns whether drafting can start."""
        text, tail, last = self._text, self._tail, len(self._ids) - 1
        # If several certain tokens are still to be run, their states are not known yet.
        if self._failed or text is None or text.length != last or not tail.first < last <= tail.end:
            return False
        normed = self._layer.normed
        try:
            begin = max(tail.first, last - KEPT)
            if self._cache is None or normed != self._normed or self._held < begin:
                self._cache = self._layer.layer.new_cache()
                self._normed, self._first, self._held = normed, begin, begin
            self._held = min(self._held, last - 1)  # the last token is always run: its logits are not kept
            self._cache.truncate(self._held - self._first)  # discards draft tokens
            self._vocabulary.follow(self._ids)
            if last - self._held > CATCH_UP:
                self._run(last - 1)
        except NpqwenError:  # there is not enough memory
            self.close()
            self._failed = True
            return False
        return True

    def next(self, drafted: list[int]) -> DraftToken | None:
        """The likeliest token after the text and the tokens `drafted`; None if there is not enough memory."""
        known, start, last = self.statistics, time.perf_counter(), len(self._ids) - 1
        alone = bool(drafted) or last - self._held == 1
        try:
            if not drafted:
                self._run(last)
            else:
                self._run_layer(drafted[-1:], self._own[None], chained=True)
        except NpqwenError:
            return None
        place = self._vocabulary.best()
        token = known.token(place, self._vocabulary.logits[0])
        if alone:
            known.add_seconds(time.perf_counter() - start)
        return token._replace(id=self._vocabulary.id(place))

    def close(self) -> None:
        """Free the layer's cache; later draft tokens start a new one."""
        self._cache = None

    def _run(self, end: int) -> None:
        """Run the tokens from `_held` + 1 to `end`, each with the state of the previous token."""
        self._run_layer(self._ids[self._held + 1 : end + 1], self._tail.rows(self._held, end))
        self._held = end

    def _run_layer(self, ids: list[int], states: NDArray[np.float32], *, chained: bool = False) -> None:
        assert self._cache is not None  # made by catch_up
        vocabulary = self._vocabulary
        self._own = self._layer.layer.run(
            ids,
            states,
            self._cache,
            vocabulary.logits,
            groups=vocabulary.groups,
            normed=self._normed,
            chained=chained,
        )
