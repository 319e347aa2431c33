"""Prompt in, text out: the loop around the forward pass and the sampler, and when it stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from npqwen.config import read_json
from npqwen.errors import CheckpointError, ContextLengthError, OptionError
from npqwen.sampler import Sampler, Sampling
from npqwen.stop_strings import StopStrings
from npqwen.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from npqwen.kv_cache import KVCache
    from npqwen.model import Model

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says about generating: the ids that end a text, and how its authors sample.

    Keys that `generation_config.json` leaves out mean what they mean in Hugging Face transformers: do_sample
    false (greedy), temperature 1, top_k 50, top_p 1, min_p 0, repetition_penalty 1. Without the file it is
    temperature 0.6, top_k 20, top_p 0.95, as Qwen3's own files have it. Its max_new_tokens is not used.
    """

    eos_ids: frozenset[int]
    sampling: Sampling

    @classmethod
    def from_directory(cls, directory: Path) -> GenerationConfig:
        """Read `generation_config.json`; the eos ids come from `config.json` if that names none."""
        path = directory / "generation_config.json"
        raw = read_json(path) if path.exists() else {}
        eos = raw.get("eos_token_id")
        if eos is None:
            eos = read_json(directory / "config.json").get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
            raise CheckpointError(f"{path}: eos_token_id is {eos!r}, not an id or a list of ids")
        if not path.exists():
            return cls(frozenset(ids), Sampling(temperature=0.6, top_k=20, top_p=0.95))
        try:
            sampling = Sampling(
                temperature=_given(raw, "temperature", 1.0) if raw.get("do_sample") else 0.0,
                top_k=_given(raw, "top_k", 50),
                top_p=_given(raw, "top_p", 1.0),
                min_p=_given(raw, "min_p", 0.0),
                repetition_penalty=_given(raw, "repetition_penalty", 1.0),
                presence_penalty=_given(raw, "presence_penalty", 0.0),
            )
        except OptionError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(frozenset(ids), sampling)


def _given(raw: dict[str, Any], key: str, default: float) -> Any:
    value = raw.get(key)
    return default if value is None else value


@dataclass(frozen=True)
class Usage:
    """What a text cost: tokens, and wall-clock seconds spent in the model (not in the caller's loop)."""

    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    first_token_seconds: float
    """From the start to the first token, the prefill included."""
    decode_seconds: float
    """For the tokens after the first."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second; 0.0 if there was no time to measure."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first; 0.0 if there was none."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished text.

    text: without eos and without the stop string. ids: every token drawn, eos and stop string included.
    finish_reason: "stop" (eos or a stop string) or "length" (max_tokens, or the context is full).
    """

    text: str
    ids: list[int] = field(repr=False)
    finish_reason: FinishReason
    usage: Usage


class Stream(Iterator[str]):
    """The pieces of a text, as they are generated.

    Iterate to generate; `close()`, or no longer iterating, ends it early. `text`, `ids` and `usage` tell at
    any time what there is so far; `finish_reason` is None until the text is finished, `stop_string` is the
    stop string that finished it, if one did.

    ids: the prompt. max_tokens, stop: see `stream`. sampling: fields of `Sampling`.
    cache: holds the first `cache.length` of `ids` already, but not all; it is left with all tokens but the
    last one drawn. progress(done, total): called as the prompt is read.
    """

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Iterable[str] = (),
        cache: KVCache | None = None,
        progress: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> None:
        _check_max_tokens(max_tokens)
        self.prompt_ids = [int(id) for id in ids]
        room = _room(model, self.prompt_ids)
        if cache is not None and cache.length >= len(ids):
            raise OptionError(f"the cache holds {cache.length} tokens, no fewer than the prompt's {len(ids)}")
        self._model = model
        self._limit = room if max_tokens is None else min(room, max_tokens)
        self._stop = _stop_strings(stop)
        self._sampling = model.generation.sampling.override(sampling)
        self._cache = model.new_cache(len(ids) + self._limit) if cache is None else cache
        self._progress = progress
        self.max_tokens = max_tokens
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._emitted: list[str] = []
        self._prefill_seconds = self._first_token_seconds = self._decode_seconds = 0.0
        self._pieces = self._generate()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End early. The model stays as usable as before."""
        self._pieces.close()

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._emitted)

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, if any."""
        return self._stop.found

    @property
    def usage(self) -> Usage:
        """What it cost so far."""
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=len(self.ids),
            prefill_seconds=self._prefill_seconds,
            first_token_seconds=self._first_token_seconds,
            decode_seconds=self._decode_seconds,
        )

    def completion(self) -> Completion:
        """Generate to the end and tell it whole. Raises OptionError if it was closed before its end."""
        for _ in self:
            pass
        if self.finish_reason is None:
            raise OptionError("the stream was closed before its end; its text so far is in .text")
        return Completion(self.text, list(self.ids), self.finish_reason, self.usage)

    def _generate(self) -> Generator[str, None, None]:
        model, cache = self._model, self._cache
        start = time.perf_counter()
        rest = np.array(self.prompt_ids[cache.length :], np.int32)
        logits = model.prefill(rest, cache, self._progress)
        self._prefill_seconds = time.perf_counter() - start
        sampler = Sampler(self._sampling, self.prompt_ids, model.tokenizer.missing_ids(len(logits)))
        decoder = StreamDecoder(model.tokenizer)
        while self.finish_reason is None:
            id = sampler(logits)
            self.ids.append(id)
            piece = self._next_piece(id, decoder)
            seconds = time.perf_counter() - start
            if len(self.ids) == 1:
                self._first_token_seconds = seconds
            else:
                self._decode_seconds += seconds
            if piece:
                self._emitted.append(piece)
                yield piece
            if self.finish_reason is None:
                start = time.perf_counter()
                logits = model.forward(np.array([id], np.int32), cache)[-1]

    def _next_piece(self, id: int, decoder: StreamDecoder) -> str:
        """The text that token `id` makes certain; sets `finish_reason` if it is the last."""
        piece = ""
        if id in self._model.generation.eos_ids:
            self.finish_reason = "stop"
        else:
            piece = self._stop.push(decoder.push(id))
            if self._stop.found is None and len(self.ids) == self._limit:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self._stop.finish(decoder.finish())
        if self._stop.found is not None:
            self.finish_reason = "stop"
        return piece


def stream(model: Model, prompt: str, **options: Any) -> Stream:
    """Generate from raw text (no chat template); the prompt is not part of the result.

    max_tokens: at most so many tokens (None: until eos, or until the context is full).
    stop: a string or several; the text ends before the first that occurs.
    progress(done, total): called as the prompt is read. The other options are `Sampling`'s fields; those left
    out, or None, are the checkpoint's own (`model.generation.sampling`).

    Raises OptionError for an empty prompt, an unknown option or one out of range, ContextLengthError for a
    prompt that does not fit the context.
    """
    if not isinstance(prompt, str):
        raise OptionError(f"the prompt is {type(prompt).__name__}, not a string")
    return Stream(model, model.tokenizer.encode(prompt), **options)


def generate(model: Model, prompt: str, **options: Any) -> Completion:
    """`stream`, run to its end."""
    return stream(model, prompt, **options).completion()


def check_options(
    prompt: str, *, max_tokens: int | None = None, stop: str | Iterable[str] = (), **sampling: Any
) -> None:
    """Raise the OptionError that `stream` would raise with any model: to know before one is loaded."""
    if not isinstance(prompt, str):
        raise OptionError(f"the prompt is {type(prompt).__name__}, not a string")
    if not prompt:
        raise OptionError("the prompt is empty, and Qwen3 has no token to begin with; give it some text")
    _check_max_tokens(max_tokens)
    _stop_strings(stop)
    Sampling().override(sampling)


def _check_max_tokens(value: object) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if value is not None and (not whole or value < 1):  # type: ignore[operator]
        raise OptionError(f"max_tokens is {value!r}; it must be a whole number, 1 or more")


def _stop_strings(stop: str | Iterable[str]) -> StopStrings:
    return StopStrings([stop] if isinstance(stop, str) else stop)


def _room(model: Model, ids: list[int]) -> int:
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
