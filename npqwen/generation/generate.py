"""Prompt in, text out: what `Model.stream` and `Model.generate` do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import numpy as np

from npqwen.errors import OptionError
from npqwen.generation.completion import Completion
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.loop_guard import LoopGuard
from npqwen.generation.sampler import LogitsProcessor, Sampling
from npqwen.generation.stream import Stream, check_limits, stop_strings, watches


def stream(model: LanguageModel, prompt: str, **options: Any) -> Stream:
    """Generate from raw text (no chat template); the prompt is not part of the result.

    max_tokens: at most so many tokens (None: until eos, or until the context is full).
    stop: a string or several; the text ends before the first that occurs. One that is a special token's name,
    which is never part of a text, ends it at that token.
    logprobs: keep each token's log-probability (`Stream.logprobs`); top_logprobs: and those of so many of the
    likeliest. They are of the model's own distribution, before anything that sampling options change.
    logits_processor(ids, logits): sees the ids so far, prompt and text, and the float32 (vocab,) logits of the
    next token, after bias and penalties; changes them in place or returns others. What it raises comes through.
    thinking_budget: a thought is ended after so many tokens, in Qwen's own words, and the answer follows.
    loop_guard: True, or a `LoopGuard` with other thresholds: a thought that repeats itself is ended, a text that
    does so finishes with "loop".
    progress(done, total): called as the prompt is read. The other options are `Sampling`'s fields; those left
    out, or None, are the checkpoint's own (`model.generation_config.sampling`).

    Raises OptionError for an empty prompt, an unknown option or one out of range, ContextLengthError for a
    prompt that does not fit the context.
    """
    if not isinstance(prompt, str):
        raise OptionError(f"the prompt is {type(prompt).__name__}, not a string")
    return Stream(model, model.tokenizer.encode(prompt), **options)


@overload
def generate(model: LanguageModel, prompt: str, *, n: None = None, **options: Any) -> Completion: ...


@overload
def generate(model: LanguageModel, prompt: str, *, n: int, **options: Any) -> list[Completion]: ...


def generate(
    model: LanguageModel, prompt: str, *, n: int | None = None, **options: Any
) -> Completion | list[Completion]:
    """`stream`, run to its end.

    n: a list of so many completions of the prompt, which is read once. Sample i is drawn with seed + i if a seed
    is given: it is what `generate` alone gives with that seed (see `Session` for the last bits).
    """
    if n is None:
        return stream(model, prompt, **options).completion()
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise OptionError(f"n is {n!r}; it must be a whole number of completions, 1 or more")
    options["stop"] = stop_strings(options.get("stop")).strings  # an iterator gives them only once
    first = stream(model, prompt, **options)
    options.pop("progress", None)
    seed = options.pop("seed", None)
    done = [first.completion()]
    for i in range(1, n):
        cache = first.cache.fork(len(first.prompt_ids) - 1)
        own = None if seed is None else seed + i
        done.append(Stream(model, first.prompt_ids, cache=cache, seed=own, **options).completion())
    return done


def check_options(
    prompt: str,
    /,
    *,
    max_tokens: int | None = None,
    stop: str | Iterable[str] | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    logits_processor: LogitsProcessor | None = None,
    thinking_budget: int | None = None,
    loop_guard: LoopGuard | bool = False,
    **sampling: Any,
) -> None:
    """Raise the OptionError that `stream` would raise with any model: to know before one is loaded."""
    if not isinstance(prompt, str):
        raise OptionError(f"the prompt is {type(prompt).__name__}, not a string")
    if not prompt:
        raise OptionError("the prompt is empty, and Qwen3 has no token to begin with; give it some text")
    check_limits(max_tokens, top_logprobs, logits_processor)
    stop_strings(stop)
    watches(thinking_budget, loop_guard)
    Sampling().override(sampling)
