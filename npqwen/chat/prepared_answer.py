"""The inputs of an answer's generation: the prompt's ids, and the options for this model and these messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

from npqwen.chat.answer import Answer, Decoded
from npqwen.chat.begun_answer import BegunAnswer
from npqwen.chat.call_structure import calls_structure, find_tools
from npqwen.chat.chat_model import ChatModel
from npqwen.chat.chat_options import ChatSettings
from npqwen.chat.messages import Message
from npqwen.chat.sampling_mode import default_sampling, thinks
from npqwen.generation.decoding import check_prompt_ids
from npqwen.generation.options import CHAT_DEFAULTS, GenerationOptions
from npqwen.structure.structure import OPTIONS as STRUCTURES
from npqwen.structure.structure import Structure
from npqwen.tools.calls import CLOSE, OPEN
from npqwen.tools.parameter_value import Schemas

GREEDY = "greedy sampling makes Qwen3's thinking repeat itself without end; a temperature of 0.6 is advised"

Prompts = Callable[[list[Message]], tuple[list[int], list[str]]]
"""prompts(messages): the prompt's ids, and notices for the user."""


@dataclass(frozen=True)
class PreparedAnswer:
    """All that a driver needs to generate an answer to some messages.

    prompt_ids: checked, with room for at least one more token in the context.
    options: the checked generation options. `stop` has only names of special tokens.
    later_options: those of the steps after the first, once tools have been run: a `tool_choice` that requires a call
    is fulfilled then.
    stops: the other stop strings, which end the answer's text, but neither reasoning nor calls.
    schemas: the parameters of the tools that may be called.
    one_call: whether the answer ends after its first call.
    notices: texts for the user, such as that a setting is advised against.
    """

    prompt_ids: list[int]
    options: GenerationOptions
    later_options: GenerationOptions
    stops: list[str]
    schemas: Schemas
    one_call: bool
    notices: list[str]

    def answer(self, decoding: Decoded) -> Answer:
        """The `Answer` that parses a generation. decoding: one with `options` or `later_options`, at its start."""
        return Answer(decoding, self.stops, self.schemas, one_call=self.one_call)


def prepare(
    model: ChatModel, settings: ChatSettings, messages: Sequence[Message], prompts: Prompts | None = None
) -> PreparedAnswer:
    """Prepare an answer to `messages`, which are checked, or the rest of the answer that they end with.

    prompts: makes the prompt; default: all messages as the model's template renders them. Raises what
    `ChatTemplate.render` and `check_prompt_ids` raise: OptionError, ContextLengthError.
    """
    begun = BegunAnswer.of(messages)
    if begun:
        settings = replace(settings, thinking=begun.is_thinking)
    options, notices = _with_defaults(model, settings, messages)
    offered = (settings.tools or {}).values()
    special_ids, token_id = model.tokenizer.special_ids, model.tokenizer.token_id
    strings = list(options.get("stop") or ())
    special = [string for string in strings if token_id(string) in special_ids]
    options["stop"] = special
    later = _with_calls(model, settings, options, again=True)
    options = _with_calls(model, settings, options)
    if prompts is None:
        ids = settings.prompter(model).ids(list(messages), model.context)
    else:
        ids, new = prompts(list(messages))
        notices += new
    return PreparedAnswer(
        check_prompt_ids(model, ids),
        options,
        later,
        [string for string in strings if string not in special],
        {} if settings.tool_choice == "none" else {tool.name: tool.parameters for tool in offered},
        not settings.parallel_tool_calls,
        notices,
    )


def _with_calls(
    model: ChatModel, settings: ChatSettings, options: GenerationOptions, *, again: bool = False
) -> GenerationOptions:
    """The options, with the structure or logit bias that `tool_choice`, tools and the model's thinking imply.

    again: whether calls have been made, so that none is required any more.
    """
    structure = Structure.of(options)
    choice = "auto" if again and settings.tool_choice != "none" else settings.tool_choice
    template = settings.template_options.get("template")
    opening = model.tokenizer.token_id(OPEN)
    if choice == "none" and settings.tools and structure is None and opening is not None:
        return {**options, "logit_bias": {**(options.get("logit_bias") or {}), opening: -math.inf}}
    required = choice not in ("auto", "none")
    if required or (choice == "auto" and settings.tools and structure is not None):
        tools = find_tools(settings.tools, choice) if required else settings.tools or {}
        structure = calls_structure(
            tools.values(),
            model.chat_template.call_style(template),
            parallel=settings.parallel_tool_calls,
            tokens=opening is not None and model.tokenizer.token_id(CLOSE) is not None,
            otherwise=None if required else structure,
        )
    if structure is None:
        return options
    kind = model.chat_template.thinking(template, settings.tools is not None)
    structure = replace(structure, thinks=kind != "never" and settings.thinking is not False)
    rest = {name: value for name, value in options.items() if name not in STRUCTURES}
    return cast(GenerationOptions, rest | {"grammar": structure})


def _with_defaults(
    model: ChatModel, settings: ChatSettings, messages: Sequence[Message]
) -> tuple[GenerationOptions, list[str]]:
    """The caller's options, and for those left out the sampling advised with or without thinking; and notices."""
    own, given = model.generation_config.sampling, settings.generation
    template = settings.template_options.get("template")
    mode = model.chat_template.mode(template, settings.tools is not None)
    thinking = thinks(mode, settings.thinking, messages)
    advised = default_sampling(own, mode, thinking)
    greedy = given.get("temperature", advised.temperature) == 0 or given.get("top_k", advised.top_k) == 1
    changed = {
        f.name: getattr(advised, f.name) for f in fields(own) if getattr(advised, f.name) != getattr(own, f.name)
    }
    options = cast(GenerationOptions, CHAT_DEFAULTS | changed | given)
    return options, [GREEDY] if thinking and greedy else []
