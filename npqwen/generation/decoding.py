"""One sequence being generated: which tokens the model must run next, and which text their logits add."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npqwen.checks import check_ids
from npqwen.errors import CheckpointError, ContextLengthError, OptionError
from npqwen.generation.completion import FinishReason, Logprob, TokenLogprobs
from npqwen.generation.guide import Guide, model_vocabulary
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.options import GenerationOptions
from npqwen.generation.sampler import Sampler, greatest
from npqwen.generation.sampling import Sampling
from npqwen.generation.stop_strings import StopStrings
from npqwen.generation.thinking import ThinkingTracker, ending_ids
from npqwen.generation.watched import EndedBy, Watch
from npqwen.structure.structure import Structure, Structured
from npqwen.tokenizer import StreamDecoder, Tokenizer
from npqwen.wording import quoted

NO_START = "and Qwen3 has no start token; give it some text"

class Decoding:
    """The state of one text. It never runs the model; a driver does, once for each step of one or of many texts:

        while not decoding.finished:
            ids = decoding.pending()
            piece = decoding.accept(logits of ids, or None if there are no ids)

    model: only its tokenizer, configuration and ids are used. prompt_ids: not empty, checked by `check_prompt_ids`.
    options: checked. limit: the most tokens to generate.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt_ids: list[int],
        options: GenerationOptions,
        watches: Iterable[Watch] = (),
        *,
        limit: int,
    ) -> None:
        tokenizer = model.tokenizer
        self._tokenizer = tokenizer
        self._vocab_size = model.config.vocab_size
        self._eos_ids = model.generation_config.eos_ids
        self.sampling = check_for_model(model, options)
        self._processor = options.get("logits_processor")
        self._top = options.get("top_logprobs") or 0
        self._watches = list(watches)
        self._limit = limit
        self.prompt_ids = prompt_ids
        self.ids: list[int] = []
        """The ids generated so far."""
        self.logprobs: list[TokenLogprobs] | None = [] if options.get("logprobs") or self._top else None
        self.finish_reason: FinishReason | None = None
        self.thinking = ThinkingTracker(tokenizer, prompt_ids)
        self.thinking_ended_by: EndedBy | None = None
        self.structure = Structure.of(options)
        """The structure that the text must have; None if no option gives one."""
        self._guide = None if self.structure is None else Guide(model, self.structure, self.thinking, prompt_ids)
        self._stop = StopStrings(options.get("stop") or ())
        self._stop_ids = {
            id: string
            for string in self._stop.strings
            if (id := tokenizer.token_id(string)) in tokenizer.special_ids and id is not None
        }
        self._stop_token: str | None = None
        self._decoder = StreamDecoder(tokenizer)
        self._pieces: list[str] = []
        self._flushed = False
        self._sampler: Sampler | None = None
        self._forced: list[int] = []
        self._run = 0
        """Number of `ids` that the model has run."""
        self._unscored: list[int] = []
        """Forced tokens to run next, for the log-probabilities of those after them."""
        self._held = ""
        """The text of these tokens, held back until their log-probabilities are known."""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to run and no text to come."""
        return self._flushed and not self._unscored

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stop_token if self._stop.found is None else self._stop.found

    @property
    def structured(self) -> Structured | None:
        """The part of the text that has the structure given by an option; None unless it is complete."""
        if self._guide is None or self.finish_reason != "stop" or self.stop_string is not None:
            return None
        return self._guide.structured(self.ids)

    @property
    def within_character(self) -> bool:
        """Whether the last token ended inside a character's bytes."""
        return self._decoder.within_character

    @property
    def remaining(self) -> int:
        """How many tokens the text may still get; 0 if it is finished."""
        return 0 if self.finish_reason is not None else self._limit - len(self.ids)

    @property
    def rows(self) -> int:
        """How many of the last pending tokens `accept` needs the logits of."""
        return len(self._unscored) or 1

    @property
    def target_length(self) -> int:
        """How many tokens of prompt and text must be in the cache before the next step; pending ones are the last."""
        return len(self.prompt_ids) + self._run + len(self._pending())

    def pending(self) -> list[int]:
        """The ids to run next, after those that were pending before; none if the next step needs no logits."""
        return self.prompt_ids if self._sampler is None else self._pending()

    def _pending(self) -> list[int]:
        """The pending ids of the text."""
        if self._unscored:
            return self._unscored
        if self.finish_reason is not None or (self._forced and self.logprobs is None):
            return []
        return self.ids[self._run :]

    def accept(self, logits: NDArray[np.float32] | None, maxima: NDArray[np.float32] | None = None) -> str:
        """Take one step, with the logits of the pending tokens; returns the text that it made certain, perhaps "".

        logits: float32 (`rows`, vocab_size), where the last row is the last token's; None if nothing was pending. Of
        several rows, the first few may come alone; the step is then taken in parts.
        maxima: the block maxima of the last row, see `npqwen.kernels.greatest.block_maxima`, if they are known. Raises
        what a logits_processor or a watch raises, OptionError if bias, processor or the text's structure leave no token
        to draw, or the structure forbids a forced one, and FormatError for logits that are not finite.
        """
        piece = self._score(logits) if self._unscored and logits is not None else self._step(logits, maxima)
        if piece:
            self._pieces.append(piece)
        return piece

    def force(self, ids: Iterable[int]) -> None:
        """Make `ids` the next tokens, after any that are forced already, in place of drawn ones.

        They become part of the text and of `ids`, count as generated, and run in one forward pass; eos, stop strings
        and the limit apply to them as to drawn tokens. Raises OptionError for ids without a token, or once the
        text is finished.
        """
        forced = check_ids("ids", ids)
        for id in forced:  # a model may have more embeddings than there are tokens
            if not 0 <= id < self._vocab_size or not self._tokenizer.token_bytes(id):
                raise OptionError(f"token id {id} cannot be forced: this model has no such token")
        if self.finish_reason is not None:
            raise OptionError("the text is finished, so no tokens can be forced into it")
        self._forced += forced

    def end(self, reason: FinishReason) -> None:
        """Finish the text after the tokens it has, with this reason; no effect if it is finished already."""
        if reason not in ("stop", "length", "loop"):
            raise OptionError(f"the reason is {reason!r}; it must be stop, length or loop")
        self.finish_reason = self.finish_reason or reason

    def end_thinking(self, by: EndedBy = "caller") -> None:
        """Force the end of the thinking, in the words that Qwen3 was trained on, so that the answer follows.

        No effect if its end is forced already. Raises OptionError if the text is not inside its thinking.
        """
        if not self.thinking.is_open:
            raise OptionError("the model is not thinking, so there is no thinking to end")
        if self.thinking_ended_by is None:
            self.force(ending_ids(self._tokenizer))
            self.thinking_ended_by = by

    def _step(self, logits: NDArray[np.float32] | None, maxima: NDArray[np.float32] | None) -> str:
        """Append the forced tokens, or draw one; returns the text this makes certain."""
        if logits is not None:
            self._run = len(self.ids)
        if self._sampler is None:
            missing = self._tokenizer.missing_ids(self._vocab_size)
            self._sampler = Sampler(self.sampling, self.prompt_ids, missing, self._processor)
            self._call_watches()
            self._follow_structure()
        if self.finish_reason is not None:
            return self._flush()
        new, self._forced = self._forced[: self._limit - len(self.ids)], []
        if new:
            for id in new:
                self._sampler.add(id)
        else:
            assert logits is not None  # something was pending
            new = [self._sampler(logits[-1], None if self._guide is None else self._guide.allowed(), maxima)]
        before = len(self.ids)
        piece = self._append(new)
        if self.logprobs is not None and logits is not None:
            new = self.ids[before:]
            self.logprobs.append(token_logprobs(logits[-1], new[0], self._top, self._tokenizer))
            if len(new) > 1:
                self._unscored, self._held = new[:-1], piece
                return ""
        return piece

    def _append(self, new: Sequence[int]) -> str:
        """Append tokens to the text, up to one that finishes it; returns the text that they make certain."""
        piece = ""
        for id in new:
            self.thinking.push(id)
            if self._guide is not None:
                self._guide.push(id)
            self.ids.append(id)
            piece += self._text_of(id)
            if self.finish_reason is not None:
                break
        else:
            self._call_watches()
            self._follow_structure()
        return piece if self.finish_reason is None else piece + self._flush()

    def _text_of(self, id: int) -> str:
        """The text that a token makes certain; sets `finish_reason` if the token ends the text."""
        if id in self._eos_ids:
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

    def _flush(self) -> str:
        """The text that was held back as the possible beginning of a stop string or of a character."""
        if self._flushed:
            return ""
        self._flushed = True
        if self._stop.found is not None:
            return ""
        piece = self._stop.finish(self._decoder.finish())
        if self._stop.found is not None:
            self.finish_reason = "stop"
        return piece

    def _call_watches(self) -> None:
        for watch in self._watches:
            watch(self)

    def _follow_structure(self) -> None:
        """Force the tokens that the text's structure leaves no choice for, unless the caller forces others."""
        if self._guide is None or self._forced or self.finish_reason is not None:
            return
        assert self._sampler is not None
        forced = self._guide.forced()
        self._forced = list(itertools.takewhile(self._sampler.may_force, forced))
        if self._guide.ended and not self._forced:
            self.finish_reason = "stop"  # eos does not exist, or is forbidden

    def _score(self, logits: NDArray[np.float32]) -> str:
        """Append the log-probabilities of forced tokens after the first; returns the text of all, with those of the
        last.

        logits: float32 (tokens, vocab_size), a row for each of the first few pending tokens.
        """
        assert self.logprobs is not None
        for row, id in zip(logits, self.ids[len(self.ids) - len(self._unscored) :], strict=False):
            self.logprobs.append(token_logprobs(row, id, self._top, self._tokenizer))
        self._run += len(logits)
        self._unscored = self._unscored[len(logits) :]
        if self._unscored:
            return ""
        piece, self._held = self._held, ""
        return piece


TokenIds = Sequence[int] | NDArray[np.integer[Any]]
"""One sequence of token ids."""
Prompt = str | TokenIds
"""A text, which is encoded, or its token ids."""
Prompts = list[str] | tuple[str, ...] | list[list[int]]
"""Several prompts."""


def check_prompt(prompt: str) -> str:
    """`prompt`; OptionError if it is empty."""
    if not prompt:
        raise OptionError(f"the prompt is empty, {NO_START}")
    return prompt


def check_prompt_ids(model: LanguageModel, prompt: Prompt, room: int = 1, name: str = "the prompt") -> list[int]:
    """The prompt's ids as a list of ints. room: how many tokens must fit into the context after it. name: for messages.

    Raises OptionError unless it is text or a sequence of at least one of the model's token ids, CheckpointError if the
    tokenizer encodes the text to ids that the model lacks, and ContextLengthError for a prompt that is too long.
    """
    if isinstance(prompt, bytes) or not hasattr(prompt, "__iter__"):
        raise OptionError(f"{name} is {quoted(prompt)}; give text or token ids")
    ids = model.tokenizer.encode(prompt, model.context) if isinstance(prompt, str) else check_ids(name, prompt)
    if not ids:
        raise OptionError(f"{name} is empty, {NO_START}")
    vocab, context = model.config.vocab_size, model.context
    foreign = next((id for id in ids if not 0 <= id < vocab), None)
    if foreign is not None and not isinstance(prompt, str):
        raise OptionError(f"{name} has token id {foreign}; the model's are 0 to {vocab - 1}")
    if foreign is not None:
        raise CheckpointError(
            f"{name} has token id {foreign} but the model has {vocab} embeddings; "
            f"is {model.path / 'tokenizer.json'} another model's?"
        )
    if len(ids) + room > context:
        raise too_long(name, "it takes", len(ids), context)
    return ids


def too_long(name: str, takes: str, tokens: int, context: int) -> ContextLengthError:
    """The error for a text that does not fit the context. takes: what takes the tokens, such as "it takes"."""
    return ContextLengthError(
        f"{name} is too long: {takes} {tokens:,} tokens, and the context is {context:,}; "
        "shorten it, or load the model with a longer context (--context, --yarn)"
    )


def check_for_model(model: LanguageModel, options: GenerationOptions) -> Sampling:
    """The model's sampling with `options` applied; OptionError for options that this model cannot obey."""
    sampling = model.generation_config.sampling.override(options)
    foreign = next((id for id in sampling.logit_bias if id >= model.config.vocab_size), None)
    if foreign is not None:
        raise OptionError(f"logit_bias has token id {foreign}; the model's are 0 to {model.config.vocab_size - 1}")
    if options.get("adapter") is not None:
        model.adapters.find(options["adapter"])
    if options.get("thinking_budget") is not None:
        ending_ids(model.tokenizer)
    structure = Structure.of(options)
    if structure is not None:
        model_vocabulary(model).compiled(structure)
    return sampling


def token_logprobs(logits: NDArray[np.float32], id: int, top: int, tokenizer: Tokenizer) -> TokenLogprobs:
    """The log-probability of token `id`, and the `top` likeliest tokens, given the model's logits (vocab_size,).

    The distribution is the softmax of these logits, before bias, penalties, temperature and filters, as in OpenAI's
    API and llama.cpp. Embedding rows without a token are never among the likeliest.
    """
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    best: list[Logprob] = []
    if top:
        real = logits.copy()
        real[tokenizer.missing_ids(len(logits))] = -np.inf
        ids = greatest(real, top)
        ids = ids[np.argsort(-real[ids], kind="stable")][:top]
        ids = ids[real[ids] > -np.inf]
        best = [Logprob(int(i), tokenizer.token_bytes(int(i)), float(logits[i]) - total) for i in ids]
    return TokenLogprobs(id, tokenizer.token_bytes(id), float(logits[id]) - total, tuple(best))
