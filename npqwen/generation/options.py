"""Every generation option, defined once: type, range, default, help, and where users can set it.

Signatures (`**options: Unpack[GenerationOptions]`), checks, command-line flags, the terminal's `/set` and the fields
of `Sampling` follow these definitions. To add an option, add an entry to `GenerationOptions` and use its value in
`npqwen.generation.decoding` or, if it shapes the distribution, as a field of `Sampling`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, cast

from npqwen.checks import is_number, suggestion
from npqwen.errors import OptionError
from npqwen.generation.loop_guard import LoopGuard
from npqwen.generation.option import Option, option_table
from npqwen.generation.stop_strings import check_stop
from npqwen.structure.sources import read_file, read_schema
from npqwen.structure.structure import check_choice, check_grammar, check_one, check_regex, check_schema
from npqwen.wording import quoted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from npqwen.generation.watched import Watch
    from npqwen.structure.structure import Structure

LogitsProcessor = Callable[[list[int], "NDArray[np.float32]"], "ArrayLike | None"]
"""processor(ids, logits): `ids` are prompt and text so far, `logits` the next token's, float32 (vocab_size,).

It changes the logits in place, or returns an array of the same shape to use instead.
"""
Progress = Callable[[int, int], None]
"""progress(done, total), in prompt tokens."""


def _check_biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name} is {quoted(value)}; it must be a dictionary of token ids and numbers")
    checked = {}
    for id, bias in value.items():
        if not isinstance(id, Integral) or isinstance(id, bool) or id < 0:
            raise OptionError(f"{name} has the key {quoted(id)}; each must be a token id, a whole number")
        if not is_number(bias) or not (bias == -math.inf or abs(bias) <= 1e30):
            raise OptionError(f"{name}[{id}] is {quoted(bias)}; it must be a number, or minus infinity to forbid")
        checked[int(id)] = float(bias)
    return checked


def _check_guard(name: str, value: Any) -> LoopGuard | bool:
    if not isinstance(value, LoopGuard | bool):
        raise OptionError(f"{name} is {quoted(value)}; it must be True, False or a LoopGuard")
    return value


def _check_function(name: str, value: Any) -> Callable[..., Any]:
    if not callable(value):
        raise OptionError(f"{name} is {quoted(value)}, not a function")
    return cast("Callable[..., Any]", value)


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise OptionError(f"{name} is {quoted(value)}; it must be text")
    return value


def _check_functions(name: str, value: Any) -> list[Callable[..., Any]]:
    if not isinstance(value, Iterable):
        raise OptionError(f"{name} is {quoted(value)}; it must be a sequence of functions")
    return [_check_function(name, function) for function in value]


class GenerationOptions(TypedDict, total=False):
    """The options of `Model.stream` and `Model.generate`. None has the same effect as leaving an option out."""

    max_tokens: Annotated[
        int | None,
        Option(
            "Generate at most N tokens; default: until the text ends or the context is full.",
            int,
            1,
            metavar="N",
            aliases=("-n",),
            elsewhere=("max_new_tokens", "n_predict", "num_predict", "predict", "max_completion_tokens", "max_length"),
        ),
    ]
    stop: Annotated[
        str | Iterable[str] | None,
        Option(
            "End the text before this string, or the first of several. A special token's name ends it at that token.",
            str,
            as_flag="may be repeated",
            metavar="TEXT",
            repeated=True,
            validate=check_stop,
            elsewhere=("reverse_prompt", "stop_sequences", "stop_strings", "extra_eos_token"),
        ),
    ]
    logprobs: Annotated[
        bool | None,
        Option(
            "Keep each token's log-probability, by the model's own distribution.",
            bool,
            default=False,
            flag=False,
            settable=False,
        ),
    ]
    top_logprobs: Annotated[
        int | None,
        Option(
            "Keep the log-probabilities of the N likeliest tokens at each position, too.",
            int,
            high=1000,
            default=0,
            metavar="N",
            flag=False,
            settable=False,
        ),
    ]
    logits_processor: Annotated[
        LogitsProcessor | None,
        Option(
            "Function (ids, logits) that changes the logits after bias and penalties.",
            flag=False,
            settable=False,
            validate=_check_function,
        ),
    ]
    schema: Annotated[
        "Mapping[str, Any] | type[Any] | bool | Structure | None",
        Option(
            "Generate JSON that follows this schema.",
            str,
            as_flag="a file or text; json: any object",
            metavar="FILE",
            validate=check_schema,
            read=read_schema,
            elsewhere=("json_schema", "json_schema_file", "format", "response_format", "guided_json", "j"),
        ),
    ]
    regex: Annotated[
        str | None,
        Option(
            "Generate a text that this regular expression matches as a whole.",
            str,
            metavar="REGEX",
            validate=check_regex,
            elsewhere=("guided_regex", "pattern"),
        ),
    ]
    choice: Annotated[
        Iterable[str] | None,
        Option(
            "Generate exactly one of the given texts.",
            str,
            as_flag="repeat it for each",
            metavar="TEXT",
            repeated=True,
            settable=False,
            validate=check_choice,
            elsewhere=("guided_choice", "choices"),
        ),
    ]
    grammar: Annotated[
        "str | Structure | None",
        Option(
            "Generate a text that follows this grammar, in llguidance's Lark or llama.cpp's GBNF.",
            str,
            metavar="FILE",
            validate=check_grammar,
            read=read_file,
            elsewhere=("grammar_file", "guided_grammar", "gbnf"),
        ),
    ]
    thinking_budget: Annotated[
        int | None,
        Option(
            "End the model's thinking after N tokens and have it answer; default: no limit.",
            int,
            metavar="N",
            elsewhere=("reasoning_budget", "budget_tokens", "max_thinking_tokens"),
        ),
    ]
    loop_guard: Annotated[
        LoopGuard | bool | None,
        Option("End thinking, or a text, that keeps repeating itself.", bool, default=False, validate=_check_guard),
    ]
    temperature: Annotated[
        float | None,
        Option(
            "Divide the logits by T; 0 always takes the likeliest token; default: the model's own.",
            float,
            0,
            100,
            metavar="T",
            aliases=("--temp",),
            elsewhere=("temp",),
        ),
    ]
    top_k: Annotated[
        int | None,
        Option("Draw only from the K likeliest tokens; 0: all; default: the model's own.", int, metavar="K"),
    ]
    top_p: Annotated[
        float | None,
        Option(
            "Draw only from the likeliest tokens that sum to probability P; 1: all; default: the model's own.",
            float,
            0,
            1,
            metavar="P",
        ),
    ]
    min_p: Annotated[
        float | None,
        Option(
            "Draw only from tokens at least P times as likely as the likeliest; 0: all; default: the model's own.",
            float,
            0,
            1,
            metavar="P",
        ),
    ]
    repetition_penalty: Annotated[
        float | None,
        Option(
            "Divide positive logits of tokens in prompt or text by X and multiply negative ones; 1: off; "
            "default: the model's own.",
            float,
            0.01,
            100,
            metavar="X",
            elsewhere=("repeat_penalty",),
        ),
    ]
    presence_penalty: Annotated[
        float | None,
        Option(
            "Subtract X from the logits of tokens generated so far; 0: off; default: the model's own.",
            float,
            -100,
            100,
            metavar="X",
        ),
    ]
    frequency_penalty: Annotated[
        float | None,
        Option(
            "Subtract X from a token's logit for each time it was generated; default: 0, off.",
            float,
            -100,
            100,
            metavar="X",
        ),
    ]
    logit_bias: Annotated[
        Mapping[int, float] | None,
        Option(
            "Add BIAS to the logit of token ID; -inf forbids the token.",
            as_flag="may be repeated",
            metavar="ID=BIAS",
            repeated=True,
            settable=False,
            validate=_check_biases,
        ),
    ]
    seed: Annotated[
        int | None,
        Option(
            "Generate the same text again for the same seed, prompt and options; default: another text each time.",
            int,
            metavar="N",
            aliases=("-s",),
            elsewhere=("random_seed", "rng_seed"),
        ),
    ]
    speculation: Annotated[
        bool | None,
        Option(
            "Draft the next tokens from the text so far and verify them in one pass; the text stays the same; "
            "default: where it is faster.",
            bool,
            elsewhere=("speculative", "spec_type", "prompt_lookup_num_tokens", "num_draft_tokens", "draft_max"),
        ),
    ]
    adapter: Annotated[
        str | None,
        Option(
            "Use the LoRA adapter of this name, one of those that the model was loaded with; default: none.",
            str,
            as_flag="NAME=DIR[:SCALE] loads it first",
            metavar="NAME",
            flag=False,
            validate=_check_text,
            elsewhere=("lora", "lora_name", "lora_request", "adapter_name"),
        ),
    ]
    cache_salt: Annotated[
        str | None,
        Option(
            "Share cached prefixes only with texts of the same salt: nobody else learns from cached tokens what this "
            "text begins with.",
            str,
            metavar="TEXT",
            flag=False,
            settable=False,
            validate=_check_text,
        ),
    ]
    progress: Annotated[
        Progress | None,
        Option(
            "Function (done, total) that is called as the prompt's tokens are read.",
            flag=False,
            settable=False,
            validate=_check_function,
        ),
    ]
    watch: Annotated[
        "Iterable[Watch] | None",
        Option(
            "Functions that are called before the first token and after every step, and may end the text.",
            flag=False,
            settable=False,
            validate=_check_functions,
        ),
    ]


OPTIONS = option_table(GenerationOptions)
"""All options by name, in the order in which messages and `--help` list them."""

ELSEWHERE = {other: option.name for option in OPTIONS.values() for other in option.elsewhere}
"""An option's name in other programs -> its name here."""

CHAT_DEFAULTS: GenerationOptions = {"loop_guard": True}
"""Defaults in a chat that differ from the options' own."""


def check_options(options: Mapping[str, Any]) -> GenerationOptions:
    """A copy of `options`, checked and without those that are None.

    Raises OptionError for an unknown name and for a value of the wrong type or out of range, whatever the model.
    """
    checked = {}
    for name, value in options.items():
        option = find_option(name)
        if value is not None:
            checked[name] = option.check(value)
    check_one(checked)
    return cast(GenerationOptions, checked)


def find_option(name: str, among: Iterable[str] = OPTIONS) -> Option:
    """The option of this name; OptionError, with the closest name, if it is not one of `among` (default: all)."""
    if name == "n":
        raise OptionError("n is an option of generate and chat, which return n results; a stream has one text")
    if name not in among:
        raise OptionError(f"unknown option {quoted(name)}; {suggestion(name, among, ELSEWHERE)}")
    return OPTIONS[name]

