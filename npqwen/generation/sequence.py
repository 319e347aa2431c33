"""A text that is being generated, with its KV cache: what every driver runs, alone or in a batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.checks import check_whole
from npqwen.engine.prefix_page import Scope, scope_of
from npqwen.errors import ContextLengthError, OptionError
from npqwen.generation.completion import Completion, Usage
from npqwen.generation.decoding import Decoding, Prompt, check_prompt_ids
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.message_starts import message_starts
from npqwen.generation.options import GenerationOptions, check_options
from npqwen.generation.speculation import PASS, speculation_for
from npqwen.generation.watches import option_watches
from npqwen.wording import quoted

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from npqwen.engine.kv_cache import KVCache


class Sequence:
    """A `Decoding`, the KV cache of its tokens, and their cost.

    The driver runs `pending_ids()` after the tokens in `cache` and passes the logits to `accept`. The cache holds a
    prefix of prompt and text; at the end, all but the last drawn or forced tokens:

        sequence.next_step()
        while not sequence.decoding.finished:
            sequence.draft()
            piece = sequence.accept(logits of pending_ids(), or None if that is empty)
            sequence.next_step()
        sequence.settle()
        sequence.close()

    A pass may run draft tokens after those that are certain. Their logits are kept, and the text advances step by step
    as it would without a draft. While the tokens that a step has to run equal those of the draft, they are in the cache
    already, and `accept` finds their logits. The first that differs ends the draft; the rest of it is rolled back.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        *,
        cache: KVCache | None = None,
        cached: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> None:
        """Prepare to continue a prompt.

        prompt: text or token ids. cache: one of this model's, which already holds the first `cached` prompt tokens
        (default: all tokens it holds); at least one must remain to run, and the cache's adapter is used. Without a
        cache, the driver sets `cache` to what `new_cache` returns.

        Raises OptionError, CheckpointError or ContextLengthError before anything is changed.
        """
        given = check_options(options)
        prompt = check_prompt_ids(model, prompt)
        self._model = model
        name = given.get("adapter")
        self.adapter = None if name is None else model.adapters.find(name)
        """The LoRA adapter with which its tokens are run; None if there is none."""
        self.salt = given.get("cache_salt") or ""
        """The option; "" if it is left out."""
        self.max_tokens = given.get("max_tokens")
        """The option, None if it is left out."""
        room = model.context - len(prompt)
        limit = room if self.max_tokens is None else min(room, self.max_tokens)
        if cache is not None:
            if not hasattr(cache, "length") or not hasattr(cache, "limit"):
                raise OptionError(f"cache is {type(cache).__name__}; make one with the model's new_cache()")
            if self.adapter is not None and cache.adapter is not self.adapter:
                other = "none" if cache.adapter is None else cache.adapter.name
                raise OptionError(
                    f"adapter is {quoted(name)}, but the cache was computed with {other}; give it a cache of its own"
                )
            self.adapter = cache.adapter
            cache.salt = self.salt = self.salt or cache.salt
            cached = cache.reusable(cache.length if cached is None else check_whole("cached", cached, 0, cache.length))
            if cached >= len(prompt):
                raise OptionError(
                    f"the cache holds {cached} tokens; it must hold fewer than the prompt's {len(prompt)}"
                )
            if cache.limit <= len(prompt):
                raise ContextLengthError(
                    f"the prompt's {len(prompt)} tokens leave no room in a cache for {cache.limit}"
                )
            limit = min(limit, cache.limit - len(prompt))
        self._tokenizer = model.tokenizer
        self.decoding = Decoding(model, prompt, given, option_watches(given), limit=limit)
        self.cancelled = False
        """Whether its driver is to end it; any thread may set this."""
        self.progress = given.get("progress")
        """progress(done, total): to be called as the prompt's tokens are run."""
        self.capacity = len(prompt) + limit
        """The most tokens that prompt and text can have."""
        if cache is not None and cached != cache.length:
            cache.truncate(cached or 0)
        self.cache = cache
        """The keys and values of the first tokens; None until a driver has made it."""
        self.cached = cached or 0
        """Prompt tokens that were already in the cache and are not computed."""
        self.drafted = self.accepted = 0
        """Draft tokens that were run, and how many of them were accepted."""
        self._speculation = speculation_for(given.get("speculation"), model.drafting, prompt, self.salt)
        self._draft: list[int] = []
        """Draft tokens to run after those that are certain."""
        self._ahead: list[int] = []
        """Draft tokens that were run and are still to be verified: the cache holds them beyond its length."""
        self._ahead_logits: NDArray[np.float32] | None = None
        """A row of logits for each of them."""
        self._found: NDArray[np.float32] | None = None
        """The logits for the next step, from an earlier pass."""
        self._outcome = 0
        """How many tokens of the last draft were accepted so far."""
        self.prefill_seconds = self.first_token_seconds = self.decode_seconds = 0.0
        self._since = 0.0

    def new_cache(self, capacity: int | None = None) -> KVCache:
        """An empty cache for this text, of up to `capacity` tokens (default: the context)."""
        cache = self._model.new_cache(capacity, None if self.adapter is None else self.adapter.name)
        cache.salt = self.salt
        return cache

    @property
    def scope(self) -> Scope:
        """Which texts share its keys and values."""
        return scope_of(None if self.adapter is None else self.adapter.fingerprint, self.salt)

    def begin_cache(self, cache: KVCache) -> None:
        """Use this cache: have it keep checkpoints where the prompt's messages begin, and have drafting follow it."""
        self.cache = cache
        if cache.recurrent is not None:
            cache.mark(message_starts(self.decoding.prompt_ids, self._tokenizer))
        if self._speculation is not None:
            self._speculation.follow(cache)

    @property
    def caches(self) -> list[KVCache]:
        """The text's cache, and that of its draft model or layer, as far as they exist."""
        drafter_cache = None if self._speculation is None else self._speculation.cache
        return [cache for cache in (self.cache, drafter_cache) if cache is not None]

    @property
    def length(self) -> int:
        """How many tokens are in the cache."""
        return 0 if self.cache is None else self.cache.length

    @property
    def begun(self) -> bool:
        """Whether any of it has been computed, or it has a cache for that."""
        return self.cache is not None or bool(self.decoding.ids)

    @property
    def pending_count(self) -> int:
        """How many tokens `pending_ids` has."""
        return self.decoding.target_length - self.length + len(self._draft)

    @property
    def draft_count(self) -> int:
        """How many of the last tokens of `pending_ids` are draft tokens."""
        return len(self._draft)

    @property
    def reads_prompt(self) -> bool:
        """Whether part of the prompt is not computed yet."""
        return self.length < len(self.decoding.prompt_ids)

    def pending_ids(self, most: int | None = None) -> list[int]:
        """The tokens to run after those in the cache, at most the first `most`; none if `accept` takes None now."""
        start, end = self.length, self.decoding.target_length
        if most is not None:
            end = min(end, start + most)
        prompt, ids = self.decoding.prompt_ids, self.decoding.ids
        draft = self._draft if most is None else self._draft[: max(0, most - (end - start))]
        if start >= len(prompt):
            return ids[start - len(prompt) : end - len(prompt)] + draft
        return prompt[start:end] + ids[: max(0, end - len(prompt))]

    @property
    def rows(self) -> int:
        """How many of the last tokens of `pending_ids` `accept` needs the logits of."""
        return self.decoding.rows + len(self._draft)

    def draft(self, most: int = PASS, others: int = 0) -> int:
        """Draft tokens that the next pass runs after those that are certain; returns how many, at most `most`.

        others: tokens of other sequences in the pass.
        """
        self._draft = []
        cache, left = self.cache, self.pending_count
        if self._speculation is None or cache is None or most < 1 or left < 1 or self.reads_prompt:
            return 0
        # If the whole draft is accepted, one more token is drawn: the one after it.
        most = min(most, self.decoding.remaining - 1)
        self._draft = self._speculation.propose(self.decoding.ids, most, left + others, alone=not others)
        return len(self._draft)

    def next_step(self) -> None:
        """Start timing the next step, and take from the last draft the tokens that the step has to run."""
        self._since = time.perf_counter()
        if not self._ahead:
            return
        left = self.pending_count
        if not left:
            return  # forced tokens come first
        cache, rows = self.cache, self.decoding.rows
        assert cache is not None
        assert self._ahead_logits is not None
        pairs = zip(self.pending_ids(), self._ahead, strict=False)
        same = next((i for i, (id, drafted) in enumerate(pairs) if id != drafted), min(left, len(self._ahead)))
        taken = same if same == left else max(0, min(same, left - rows))
        cache.restore(taken)
        self.accepted += taken
        self._outcome += taken
        if taken < left:
            self._end_draft(same < min(left, len(self._ahead)))
            return
        self._found = self._ahead_logits[taken - rows : taken]
        self._ahead, self._ahead_logits = self._ahead[taken:], self._ahead_logits[taken:]
        if not self._ahead:
            self._end_draft(False)

    def accept(self, logits: NDArray[np.float32] | None, maxima: NDArray[np.float32] | None = None) -> str:
        """Take one step with the logits of the tokens that were run, see `Decoding.accept`; returns its text.

        maxima: the block maxima of each row of logits, if they are known.
        """
        decoding, count = self.decoding, len(self._draft)
        if count:
            assert self.cache is not None
            assert logits is not None
            self.cache.retract(count)
            self._ahead, self._ahead_logits, self._draft = self._draft, logits[-count:], []
            logits = logits[:-count]
            self.drafted += count
            self._outcome = 0
        elif logits is None:
            logits, self._found = self._found, None
            maxima = None
        first = not decoding.ids
        if first:
            self.prefill_seconds = time.perf_counter() - self._since
        piece = decoding.accept(logits, None if maxima is None else maxima[-1 - count])
        now = time.perf_counter()
        if not first:
            self.decode_seconds += now - self._since
        elif decoding.ids:
            self.first_token_seconds = now - self._since
        return piece

    def settle(self) -> None:
        """Discard draft tokens: the cache then holds a prefix of prompt and text, whatever interrupted a step."""
        self._draft, self._ahead, self._ahead_logits, self._found = [], [], None, None
        known = len(self.decoding.prompt_ids) + len(self.decoding.ids)
        if self.length > known:
            assert self.cache is not None
            self.cache.truncate(known)

    def stop_drafting(self) -> None:
        """Stop drafting by a model or layer, and free its cache, for lack of memory."""
        if self._speculation is not None:
            self._speculation.stop_model()

    def close(self) -> None:
        """End drafting, as the text has ended. Closing again has no effect."""
        if self._speculation is not None:
            self._speculation.close(self.decoding.ids)
        self._speculation = None

    def _end_draft(self, rejected: bool) -> None:
        """Discard the rest of a draft. rejected: whether one of its tokens was rejected."""
        self._ahead, self._ahead_logits = [], None
        if self._speculation is not None:
            self._speculation.learn(self._outcome, rejected)

    @property
    def usage(self) -> Usage:
        """Tokens and seconds so far."""
        return Usage(
            prompt_tokens=len(self.decoding.prompt_ids),
            generated_tokens=len(self.decoding.ids),
            prefill_seconds=self.prefill_seconds,
            first_token_seconds=self.first_token_seconds,
            decode_seconds=self.decode_seconds,
            cached_tokens=self.cached,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )

    def completion(self) -> Completion:
        """The whole text; OptionError if it was closed before its end."""
        decoding = self.decoding
        if decoding.finish_reason is None:
            raise OptionError("the stream was closed before its end; its text so far is in .text")
        logprobs = None if decoding.logprobs is None else list(decoding.logprobs)
        reason, structured = decoding.finish_reason, decoding.structured
        return Completion(decoding.text, list(decoding.ids), reason, self.usage, logprobs, structured)
