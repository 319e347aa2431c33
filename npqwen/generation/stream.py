"""The loop around the forward pass and the sampler: prompt ids in, pieces of text out, and when it stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import CheckpointError, ContextLengthError, OptionError
from npqwen.generation.completion import Completion, FinishReason, Usage
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.logprobs import TokenLogprobs, token_logprobs
from npqwen.generation.loop_guard import LoopWatch
from npqwen.generation.options import GenerationOptions, LoopGuard, check_options
from npqwen.generation.sampler import Sampler
from npqwen.generation.sampling import Sampling
from npqwen.generation.stop_strings import StopStrings
from npqwen.generation.thinking_budget import ThinkingBudget, ending_ids
from npqwen.generation.thought import ThinkingTracker
from npqwen.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from npqwen.engine.kv_cache import KVCache


class Stream(Iterator[str]):
    """The pieces of a text, as they are generated.

    Iterate to generate; `close()`, or no longer iterating, ends it early. `text`, `ids`, `logprobs` and `usage`
    tell at any time what there is so far; `finish_reason` is None until the text is finished, `stop_string` is
    the stop string that finished it, if one did.

    ids: the prompt. cache: holds the first of them already, but not all: `cached` tokens, behind which it is cut
    off (default: `cache.length`). At any time it holds a beginning of prompt and text, at the end all but the
    tokens drawn or forced last.
    options: see `npqwen.generation.options`. The functions of `watch` may `force` tokens or `end` the text.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: Sequence[int],
        *,
        cache: KVCache | None = None,
        cached: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> None:
        given = check_options(options)
        max_tokens = given.get("max_tokens")
        tokenizer = model.tokenizer
        self._stop = StopStrings(given.get("stop") or ())
        self._stop_ids = {
            id: string
            for string in self._stop.strings
            if (id := tokenizer.token_id(string)) in tokenizer.special_ids and id is not None
        }
        self._watch = watches(given)
        self._sampling = check_for_model(model, given)
        self.prompt_ids = [int(id) for id in ids]
        room = _room(model, self.prompt_ids)
        if cache is None:
            cache = model.new_cache(len(ids) + (room if max_tokens is None else min(room, max_tokens)))
        cached = cache.length if cached is None else cached
        if cached >= len(ids):
            raise OptionError(f"the cache holds {cached} tokens, no fewer than the prompt's {len(ids)}")
        if cache.limit <= len(ids):
            raise ContextLengthError(f"the prompt's {len(ids)} tokens leave no room in a cache for {cache.limit}")
        room = min(room, cache.limit - len(ids))
        self._limit = room if max_tokens is None else min(room, max_tokens)
        self._model = model
        self.cache = cache
        self._processor = given.get("logits_processor")
        self._progress = given.get("progress")
        self._top = given.get("top_logprobs") or 0
        self.max_tokens = max_tokens
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = [] if given.get("logprobs") or self._top else None
        self.finish_reason: FinishReason | None = None
        self.thinking = ThinkingTracker(tokenizer, self.prompt_ids)
        self.thinking_ended_by: Literal["budget", "loop", "caller"] | None = None
        """Who cut the thought short, if anybody did."""
        self._decoder = StreamDecoder(tokenizer)
        self._emitted: list[str] = []
        self._forced: list[int] = []
        self._stop_token: str | None = None
        self._flushed = False
        self._cached_tokens = cached
        self._prefill_seconds = self._first_token_seconds = self._decode_seconds = 0.0
        self._pieces = self._generate()
        if cached != cache.length:
            cache.truncate(cached)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End early. The model stays as usable as before."""
        self._pieces.close()

    def force(self, ids: Iterable[int]) -> None:
        """Make `ids` the next tokens, after any that are forced already, in place of drawn ones.

        They become part of the text and of `ids`, count as generated, and run in one forward pass; eos, stop
        strings and `max_tokens` end the text among them as among others. Call it between two pieces, or from a
        watch. Raises OptionError for ids without a token, or once the text is finished.
        """
        forced = [int(id) for id in ids]
        vocab, bytes_of = self._model.config.vocab_size, self._model.tokenizer.token_bytes
        # A model may have more embeddings than there are tokens.
        foreign = next((id for id in forced if not (0 <= id < vocab and bytes_of(id))), None)
        if foreign is not None:
            raise OptionError(f"token id {foreign} cannot be forced: this model has no such token")
        if self.finish_reason is not None:
            raise OptionError("nothing can be forced into a text that is finished")
        self._forced += forced

    def end(self, reason: FinishReason) -> None:
        """Finish the text after the tokens there are, with this `finish_reason`, unless it is finished."""
        self.finish_reason = self.finish_reason or reason

    def end_thinking(self, by: Literal["budget", "loop", "caller"] = "caller") -> None:
        """Force the end of the thought that is open, in Qwen's own words, so that the answer follows.

        If its end is on the way already, nothing happens. Raises OptionError if there is no open thought.
        """
        if not self.thinking.is_open:
            raise OptionError("there is no open thought to end")
        if self.thinking_ended_by is not None:
            return
        self.force(ending_ids(self._model.tokenizer))
        self.thinking_ended_by = by

    @property
    def within_character(self) -> bool:
        """Whether the last token ended inside a character's bytes."""
        return self._decoder.within_character

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._emitted)

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, if any."""
        return self._stop_token if self._stop.found is None else self._stop.found

    @property
    def usage(self) -> Usage:
        """What it cost so far."""
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=len(self.ids),
            prefill_seconds=self._prefill_seconds,
            first_token_seconds=self._first_token_seconds,
            decode_seconds=self._decode_seconds,
            cached_tokens=self._cached_tokens,
        )

    def completion(self) -> Completion:
        """Generate to the end and tell it whole. Raises OptionError if it was closed before its end."""
        for _ in self:
            pass
        if self.finish_reason is None:
            raise OptionError("the stream was closed before its end; its text so far is in .text")
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return Completion(self.text, list(self.ids), self.finish_reason, self.usage, logprobs)

    def _generate(self) -> Generator[str, None, None]:
        model, cache = self._model, self.cache
        start = time.perf_counter()
        rest = np.array(self.prompt_ids[cache.length :], np.int32)
        logits = model.prefill(rest, cache, self._progress)
        self._prefill_seconds = time.perf_counter() - start
        missing = model.tokenizer.missing_ids(len(logits))
        sampler = Sampler(self._sampling, self.prompt_ids, missing, self._processor)
        for watch in self._watch:
            watch(self)
        while self.finish_reason is None:
            forced, self._forced = self._forced[: self._limit - len(self.ids)], []
            ahead = self.ids[cache.length - len(self.prompt_ids) :]
            if ahead and (not forced or self.logprobs is not None):
                logits = model.forward(np.array(ahead, np.int32), cache, out=logits.reshape(1, -1))[0]
            new = forced or [sampler(logits)]
            for id in forced:
                sampler.add(id)
            before = len(self.ids)
            piece = self._next_piece(new)
            if self.logprobs is not None:
                self.logprobs += self._scored(self.ids[before:], logits)
            seconds = time.perf_counter() - start
            if before == 0:
                self._first_token_seconds = seconds
            else:
                self._decode_seconds += seconds
            if piece:
                self._emitted.append(piece)
                yield piece
            start = time.perf_counter()
        if not self._flushed:
            self._emitted.append(self._rest())
            yield self._emitted[-1]

    def _next_piece(self, new: Sequence[int]) -> str:
        """The text that the tokens `new` make certain; sets `finish_reason` if the last one is among them."""
        piece = ""
        for id in new:
            self.ids.append(id)
            self.thinking.push(id)
            piece += self._text_of(id)
            if self.finish_reason is not None:
                break
        else:
            for watch in self._watch:
                watch(self)
        return piece if self.finish_reason is None else piece + self._rest()

    def _text_of(self, id: int) -> str:
        if id in self._model.generation_config.eos_ids:
            self.finish_reason = "stop"
            return ""
        if id in self._stop_ids:
            self.finish_reason, self._stop_token = "stop", self._stop_ids[id]
            return ""
        piece = self._stop.push(self._decoder.push(id))
        if self._stop.found is not None:
            self.finish_reason = "stop"
        elif len(self.ids) == self._limit:
            self.finish_reason = "length"
        return piece

    def _rest(self) -> str:
        """What was held back, now that nothing follows."""
        self._flushed = True
        if self._stop.found is not None:
            return ""
        piece = self._stop.finish(self._decoder.finish())
        if self._stop.found is not None:
            self.finish_reason = "stop"
        return piece

    def _scored(self, new: list[int], logits: NDArray[np.float32]) -> list[TokenLogprobs]:
        """logits: those of the first of `new`; of forced tokens, the others' are computed here."""
        rows = [logits]
        if len(new) > 1:
            rows += list(self._model.forward(np.array(new[:-1], np.int32), self.cache, all_logits=True))
        tokenizer = self._model.tokenizer
        return [token_logprobs(row, id, self._top, tokenizer) for row, id in zip(rows, new, strict=True)]


def watches(options: GenerationOptions) -> list[Callable[[Stream], None]]:
    """The functions that watch a text with these (checked) options."""
    found: list[Callable[[Stream], None]] = []
    budget, guard = options.get("thinking_budget"), options.get("loop_guard")
    if budget is not None:
        found.append(ThinkingBudget(budget))
    if guard:
        found.append(LoopWatch(guard if isinstance(guard, LoopGuard) else LoopGuard()))
    return [*found, *(options.get("watch") or ())]


def check_for_model(model: LanguageModel, options: GenerationOptions) -> Sampling:
    """The model's sampling with `options` applied; OptionError for options that this model cannot obey."""
    sampling = model.generation_config.sampling.override(options)
    foreign = next((id for id in sampling.logit_bias if id >= model.config.vocab_size), None)
    if foreign is not None:
        raise OptionError(f"logit_bias has token id {foreign}; the model's are 0 to {model.config.vocab_size - 1}")
    if options.get("thinking_budget") is not None:
        ending_ids(model.tokenizer)
    return sampling


def _room(model: LanguageModel, ids: list[int]) -> int:
    """How many tokens may follow the prompt `ids`, which is checked."""
    if not ids:
        raise OptionError("the prompt is empty, and Qwen3 has no token to begin with; give it some text")
    vocab, context = model.config.vocab_size, model.context
    foreign = next((id for id in ids if not 0 <= id < vocab), None)
    if foreign is not None:
        raise CheckpointError(
            f"the prompt has token id {foreign} but the model has {vocab} embeddings; "
            f"is {model.path / 'tokenizer.json'} another model's?"
        )
    if len(ids) >= context:
        longer = context < model.config.max_position_embeddings
        raise ContextLengthError(
            f"the prompt's {len(ids)} tokens leave no room in the context of {context}; shorten it"
            + (", or load the model with a longer context" if longer else "")
        )
    return context - len(ids)
