"""A text that is generated step by step: the driver that runs one sequence's tokens through the model."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from npqwen.engine.piece import Piece
from npqwen.errors import OptionError, OutOfMemoryError
from npqwen.generation.async_iteration import AsyncSteps, awaited
from npqwen.generation.completion import Completion, FinishReason, TokenLogprobs, Usage
from npqwen.generation.decoding import Prompt
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.options import GenerationOptions
from npqwen.generation.sampling import Sampling
from npqwen.generation.sequence import Sequence
from npqwen.generation.speculation import PASS
from npqwen.generation.thinking import ThinkingTracker
from npqwen.generation.watched import EndedBy
from npqwen.kernels.cache_page import PAGE
from npqwen.structure.structure import Structure, Structured

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from npqwen.engine.kv_cache import KVCache
    from npqwen.generation.batch import Batch


class Stream(AsyncSteps[str]):
    """The pieces of a text, as they are generated; iterate with `for` or `async for`.

    `text`, `ids`, `logprobs` and `usage` are up to date after every piece; `finish_reason` is None until the text is
    finished. `close()` ends it early, and the model remains usable; a stream that is no longer iterated computes
    nothing. One thread at a time may iterate; `cancel` may be called from any.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        *,
        cache: KVCache | None = None,
        cached: int | None = None,
        batch: Batch | None = None,
        **options: Unpack[GenerationOptions],
    ) -> None:
        """Prepare to continue a prompt.

        prompt: text or token ids. cache: one of this model's, which already holds the first `cached` prompt tokens
        (default: all tokens it holds); tokens after them are discarded, and at least one must remain to run. Its
        adapter is used, and the option `adapter` may only name the same. While the stream runs, the cache holds a
        prefix of prompt and text; at the end, all but the last drawn or forced tokens. batch: runs this stream together
        with the batch's others; iterating any of them advances all.

        Raises OptionError, CheckpointError or ContextLengthError before anything is computed or changed.
        """
        self._sequence = sequence = Sequence(model, prompt, cache=cache, cached=cached, **options)
        self._decoding = sequence.decoding
        self._batch = batch
        self._cancelled = False
        self._computed: tuple[int, int] | None = None
        """The cache's `cuts` and `length` after the last pass; None if there is nothing to keep."""
        self._model = model
        self._rows: NDArray[np.float32] | None = None
        """Receives the logits of passes with drafts."""
        self._pieces = self._generate() if batch is None else batch.pieces(sequence)

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except ValueError as error:
            if str(error) != "generator already executing":
                raise
            raise OptionError("another thread is running this stream; give each thread its own") from None

    def close(self) -> None:
        """End the text early. Raises OptionError while another thread iterates; see `cancel`."""
        if self._batch is not None:
            self._batch.cancel(self._sequence)
        try:
            self._pieces.close()
        except ValueError:  # the generator is running
            raise OptionError("another thread is running this stream; cancel() ends it") from None
        self._keep()

    def cancel(self) -> None:
        """End the text after the pass in progress: one token, or one chunk of the prompt. Any thread may call this."""
        self._cancelled = True
        if self._batch is not None:
            self._batch.cancel(self._sequence)

    def force(self, ids: Iterable[int]) -> None:
        """Make `ids` the next tokens, after any that are forced already, in place of drawn ones.

        They become part of the text and of `ids`, count as generated, and run in one forward pass; eos, stop strings
        and max_tokens apply to them as to drawn tokens. Call this between two pieces, or from a watch. Raises
        OptionError for ids without a token, or once the text is finished.
        """
        self._decoding.force(ids)

    def end(self, reason: FinishReason) -> None:
        """Finish the text after the tokens it has, with this `finish_reason`; no effect if it is finished already."""
        self._decoding.end(reason)

    def end_thinking(self, by: EndedBy = "caller") -> None:
        """Force the end of the thinking, in the words that Qwen3 was trained on, so that the answer follows.

        No effect if its end is forced already. Raises OptionError if the model is not thinking.
        """
        self._decoding.end_thinking(by)

    @property
    def cache(self) -> KVCache:
        """The KV cache. In a batch, it may be replaced by another one when the next piece is generated."""
        sequence = self._sequence
        if sequence.cache is None:  # the batch has not begun to run this stream
            sequence.cache = sequence.new_cache(sequence.capacity)
        return sequence.cache

    @property
    def max_tokens(self) -> int | None:
        """The option, None if it is left out."""
        return self._sequence.max_tokens

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's ids."""
        return self._decoding.prompt_ids

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn: the checkpoint's sampling with the options applied."""
        return self._decoding.sampling

    @property
    def ids(self) -> list[int]:
        """All ids generated so far, including eos and the stop string's."""
        return self._decoding.ids

    @property
    def text(self) -> str:
        """All pieces so far."""
        return self._decoding.text

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """One entry for each of `ids`; None unless requested."""
        return self._decoding.logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended; None before that, and if it was closed."""
        return self._decoding.finish_reason

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._decoding.stop_string

    @property
    def thinking(self) -> ThinkingTracker:
        """The state of the text's thinking, and its length."""
        return self._decoding.thinking

    @property
    def thinking_ended_by(self) -> EndedBy | None:
        """Why the thinking was cut short; None if it was not."""
        return self._decoding.thinking_ended_by

    @property
    def structure(self) -> Structure | None:
        """The structure that the text must have; None if no option gives one."""
        return self._decoding.structure

    @property
    def structured(self) -> Structured | None:
        """The part of the text that has the structure given by an option; None until it is complete."""
        return self._decoding.structured

    @property
    def within_character(self) -> bool:
        """Whether the last token ended inside a character's bytes."""
        return self._decoding.within_character

    @property
    def usage(self) -> Usage:
        """Tokens and seconds so far."""
        return self._sequence.usage

    def completion(self) -> Completion:
        """Generate the rest; returns the whole text. Raises OptionError if the stream was closed before its end."""
        for _ in self:
            pass
        return self._sequence.completion()

    def __await__(self) -> Generator[Any, None, Completion]:
        """`await` generates the rest in threads, as `async for` does; the whole text."""
        return awaited(self, self.completion).__await__()

    def _generate(self) -> Generator[str, None, None]:
        sequence, decoding, cache = self._sequence, self._decoding, self.cache
        sequence.next_step()
        sequence.begin_cache(cache)
        prompt = np.array(decoding.prompt_ids, np.int32)
        sequence.cached = self._model.prefixes.extend(prompt[:-1], cache)
        try:
            logits: NDArray[np.float32] | None = self._prefill(cache)
            self._model.prefixes.keep(prompt[: len(prompt) // PAGE * PAGE], cache)
            buffer = logits
            while True:
                self._computed = cache.cuts, cache.length - sequence.draft_count
                piece = sequence.accept(logits)
                if decoding.finished:
                    self._keep()
                if piece:
                    yield piece
                if decoding.finished or self._cancelled:
                    return
                sequence.next_step()
                logits = self._forward(cache, buffer)
        except _Cancelled:
            return
        finally:
            sequence.settle()
            sequence.close()

    def _keep(self) -> None:
        """Keep the cache's tokens as a prefix for other texts, unless the cache's owner has changed it since."""
        computed, self._computed = self._computed, None
        cache = self._sequence.cache
        if computed is not None and cache is not None and cache.cuts == computed[0]:
            ids = np.array(self.prompt_ids + self.ids, np.int32)
            self._model.prefixes.keep(ids[: computed[1]], cache)

    def _prefill(self, cache: KVCache) -> NDArray[np.float32]:
        """Run the prompt; returns its last token's logits (1, vocab_size)."""
        report = self._sequence.progress

        def progress(done: int, total: int) -> None:
            if report is not None:
                report(done, total)
            if self._cancelled:
                raise _Cancelled

        return self._model.prefill(np.array(self._sequence.pending_ids(), np.int32), cache, progress).reshape(1, -1)

    def _forward(self, cache: KVCache, buffer: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """Run the pending tokens; returns the logits that the next step takes, in `buffer` if they are one row."""
        sequence = self._sequence
        if sequence.draft() and not self._has_room(cache):
            sequence.draft(0)
        ids = np.array(sequence.pending_ids(), np.int64)
        if not ids.size:
            return None
        if sequence.draft_count:
            if self._rows is None:
                self._rows = self._model.new_logits(PASS)
            return self._model.forward_pieces([Piece(ids, cache, sequence.rows, sequence.draft_count)], self._rows)[0]
        if sequence.rows > 1:
            return self._model.forward(ids, cache, all_logits=True)
        return self._model.forward(ids, cache, out=buffer)

    def _has_room(self, cache: KVCache) -> bool:
        """Make room for the next pass; returns whether there is memory for it."""
        try:
            cache.reserve(self._sequence.pending_count)
        except OutOfMemoryError:
            return False
        return True


class _Cancelled(Exception):
    """Ends the prefill of a stream that was cancelled."""
