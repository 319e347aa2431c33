"""Text in, text out: what `Model.stream` and `Model.generate` do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

from npqwen.checks import check_whole
from npqwen.errors import OptionError
from npqwen.generation.batch import Batch
from npqwen.generation.completion import Completion
from npqwen.generation.decoding import Prompt, Prompts, check_prompt_ids
from npqwen.generation.language_model import LanguageModel
from npqwen.generation.options import GenerationOptions, check_options
from npqwen.generation.session import Session, check_session
from npqwen.generation.stream import Stream
from npqwen.wording import quoted

if TYPE_CHECKING:
    from typing_extensions import Unpack


def stream(
    model: LanguageModel, prompt: Prompt, *, session: Session | None = None, **options: Unpack[GenerationOptions]
) -> Stream:
    """Continue `prompt`, raw text without a chat template, or its ids; the prompt is not part of the result.

    session: one of this model; a prefix of the prompt that it has computed is not computed again, and afterwards it
    holds prompt and text. options: see `GenerationOptions`. Sampling options that are left out are the checkpoint's own
    (`model.generation_config.sampling`). Exceptions raised by functions among the options propagate.

    Raises OptionError for an empty prompt, an unknown option or one out of range, and ContextLengthError for a prompt
    that does not fit the context, all before anything is computed.
    """
    check_session(session, model)
    return Stream(model, prompt, **options) if session is None else session.stream(prompt, **options)


@overload
def generate(
    model: LanguageModel,
    prompt: Prompt,
    *,
    n: None = None,
    session: Session | None = None,
    **options: Unpack[GenerationOptions],
) -> Completion: ...


@overload
def generate(
    model: LanguageModel,
    prompt: Prompt,
    *,
    n: int,
    session: Session | None = None,
    **options: Unpack[GenerationOptions],
) -> list[Completion]: ...


@overload
def generate(
    model: LanguageModel,
    prompt: Prompts,
    *,
    n: None = None,
    session: Session | None = None,
    **options: Unpack[GenerationOptions],
) -> list[Completion]: ...


@overload
def generate(
    model: LanguageModel,
    prompt: Prompts,
    *,
    n: int,
    session: Session | None = None,
    **options: Unpack[GenerationOptions],
) -> list[list[Completion]]: ...


def generate(
    model: LanguageModel,
    prompt: Prompt | Prompts,
    *,
    n: int | None = None,
    session: Session | None = None,
    **options: Unpack[GenerationOptions],
) -> Completion | list[Completion] | list[list[Completion]]:
    """Continue a prompt to the end of its text, or each of a list of prompts, as it would be continued alone.

    n: return a list of n completions of each prompt, which is computed once. Sample i is drawn with seed + i if a seed
    is given, so it is what `generate` alone returns with that seed. session: one of this model; afterwards it holds the
    last prompt and its first completion. options: see `stream`.

    Raises what `stream` raises, for any of the prompts, before anything is computed.
    """
    samples = 1 if n is None else check_whole("n", n, 1)
    given = check_options(options)  # iterators among them can be read only once
    check_session(session, model)
    alone = _is_one(prompt)
    prompts: Iterable[Any] = [prompt] if alone else prompt
    names = ("the prompt" if alone else f"prompts[{at}]" for at in itertools.count())
    ids = [check_prompt_ids(model, each, name=name) for each, name in zip(prompts, names, strict=False)]
    done = _all(model, ids, samples, session, given)
    texts = [each[0] for each in done] if n is None else done
    return texts[0] if alone else texts


def _is_one(prompt: object) -> bool:
    """Whether it is one prompt, as text or ids, rather than a list of prompts. Raises OptionError if it is neither."""
    if isinstance(prompt, str) or hasattr(prompt, "tolist"):
        return True
    if not isinstance(prompt, list | tuple):
        raise OptionError(f"the prompt is {quoted(prompt)}; give text, token ids, or a list of prompts")
    return bool(prompt) and not hasattr(prompt[0], "__len__")


def _all(
    model: LanguageModel, prompts: list[list[int]], n: int, session: Session | None, options: GenerationOptions
) -> list[list[Completion]]:
    """n completions of each prompt, all in one batch; the session has the first one of the last prompt."""
    if not prompts:
        return []
    batch = Batch(model) if len(prompts) * n > 1 else None
    session = session or Session(model)
    last = session.stream(prompts[-1], batch=batch, **options)
    samples = [_sampled(options, i) for i in range(n)]
    streams = [
        [
            last if prompt is prompts[-1] and i == 0 else Stream(model, prompt, batch=batch, **sampled)
            for i, sampled in enumerate(samples)
        ]
        for prompt in prompts
    ]
    return [[stream.completion() for stream in each] for each in streams]


def _sampled(options: GenerationOptions, i: int) -> GenerationOptions:
    """The options of sample i: its own seed, and only for sample 0, which runs the prompt, a progress function."""
    options, seed = options.copy(), options.get("seed")
    if i:
        options.pop("progress", None)
        options["seed"] = None if seed is None else seed + i
    return options
