"""Text in, text out: what `Model.stream` and `Model.generate` do."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from npqwen.checks import check_whole
from npqwen.errors import OptionError, quoted
from npqwen.generation.completion import Completion
from npqwen.generation.decoding import check_prompt_ids
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.options import GenerationOptions, check_options
from npqwen.generation.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompts = list[str] | tuple[str, ...]


def stream(model: LanguageModel, prompt: str, **options: Unpack[GenerationOptions]) -> Stream:
    """Continue `prompt`, raw text without a chat template; the prompt is not part of the result.

    options: see `GenerationOptions`. Sampling options that are left out are the checkpoint's own
    (`model.generation_config.sampling`). Exceptions of the functions among them propagate.

    Raises OptionError for an empty prompt, an unknown option or one out of range, and ContextLengthError for a prompt
    that does not fit the context, all before anything is computed.
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


@overload
def generate(
    model: LanguageModel, prompt: Prompts, *, n: None = None, **options: Unpack[GenerationOptions]
) -> list[Completion]: ...


@overload
def generate(
    model: LanguageModel, prompt: Prompts, *, n: int, **options: Unpack[GenerationOptions]
) -> list[list[Completion]]: ...


def generate(
    model: LanguageModel, prompt: str | Prompts, *, n: int | None = None, **options: Unpack[GenerationOptions]
) -> Completion | list[Completion] | list[list[Completion]]:
    """Continue a prompt to the end of its text, or each of a list of prompts, as it would be continued alone.

    n: return a list of n completions of each prompt, which is read once. Sample i is drawn with seed + i if a seed is
    given, so it is what `generate` alone gives with that seed (see `Session` for rounding). options: see `stream`.

    Raises what `stream` raises, for any of the prompts, before anything is computed.
    """
    samples = 1 if n is None else check_whole("n", n, 1)
    given = check_options(options)  # iterators among them can be read only once
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple):
        raise OptionError(f"the prompt is {type(prompts).__name__}, not a string or a list of strings")
    ids = [check_prompt_ids(model, model.tokenizer.encode(check_prompt(text))) for text in prompts]
    done = [_samples(model, each, samples, given) for each in ids]
    texts = [each[0] for each in done] if n is None else done
    return texts[0] if isinstance(prompt, str) else texts


def check_prompt(prompt: object) -> str:
    """`prompt`; OptionError unless it is a string of at least one character."""
    if not isinstance(prompt, str):
        raise OptionError(f"the prompt is {quoted(prompt)}, not a string")
    if not prompt:
        raise OptionError("the prompt is empty, and Qwen3 has no start token; give it some text")
    return prompt


def _samples(model: LanguageModel, prompt: list[int], n: int, options: GenerationOptions) -> list[Completion]:
    """n completions of one prompt. The later ones continue a copy of the first one's cache."""
    first = Stream(model, prompt, **options)
    done = [first.completion()]
    later, seed = options.copy(), options.get("seed")
    later.pop("progress", None)
    for i in range(1, n):
        later["seed"] = None if seed is None else seed + i
        cache = first.cache.fork(first.cache.reusable(len(prompt) - 1))
        done.append(Stream(model, prompt, cache=cache, **later).completion())
    return done
