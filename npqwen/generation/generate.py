"""Prompt in, text out: what `Model.stream` and `Model.generate` do."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from npqwen.checks import check_whole
from npqwen.errors import OptionError
from npqwen.generation.completion import Completion
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.options import GenerationOptions, check_options
from npqwen.generation.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack



def stream(model: LanguageModel, prompt: str, **options: Unpack[GenerationOptions]) -> Stream:
    """Generate from raw text (no chat template); the prompt is not part of the result.

    options: see `npqwen.generation.options.GenerationOptions`. Sampling options that are left out, or None, are the
    checkpoint's own (`model.generation_config.sampling`). Exceptions of a logits_processor propagate.

    Raises OptionError for an empty prompt, an unknown option or one out of range, ContextLengthError for a
    prompt that does not fit the context.
    """
    return Stream(model, model.tokenizer.encode(check_prompt(prompt)), **options)


@overload
def generate(
    model: LanguageModel, prompt: str, *, n: None = None, **options: Unpack[GenerationOptions]
) -> Completion: ...


@overload
def generate(
    model: LanguageModel, prompt: str, *, n: int, **options: Unpack[GenerationOptions]
) -> list[Completion]: ...


def generate(
    model: LanguageModel, prompt: str, *, n: int | None = None, **options: Unpack[GenerationOptions]
) -> Completion | list[Completion]:
    """`stream`, run to its end.

    n: a list of so many completions of the prompt, which is read once. Sample i is drawn with seed + i if a seed
    is given: it is what `generate` alone gives with that seed (see `Session` for the last bits).
    """
    if n is None:
        return stream(model, prompt, **options).completion()
    n = check_whole("n", n, 1)
    options = check_options(options)  # an iterator of stop strings can be read only once
    first = stream(model, prompt, **options)
    options.pop("progress", None)
    seed = options.get("seed")
    done = [first.completion()]
    for i in range(1, n):
        cache = first.cache.fork(len(first.prompt_ids) - 1)
        options["seed"] = None if seed is None else seed + i
        done.append(Stream(model, first.prompt_ids, cache=cache, **options).completion())
    return done


def check_prompt(prompt: object) -> str:
    """`prompt`; OptionError unless it is a string of at least one character."""
    if not isinstance(prompt, str):
        raise OptionError(f"the prompt is {type(prompt).__name__}, not a string")
    if not prompt:
        raise OptionError("the prompt is empty, and Qwen3 has no token to begin with; give it some text")
    return prompt
