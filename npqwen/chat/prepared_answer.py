"""What an answer is generated from: the prompt's ids, and the options that hold for this model and these messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import cast

from npqwen.chat.chat_model import ChatModel
from npqwen.chat.chat_options import ChatSettings
from npqwen.chat.messages import Message
from npqwen.chat.sampling_mode import default_sampling, thinks
from npqwen.generation.decoding import check_prompt_ids
from npqwen.generation.options import CHAT_DEFAULTS, GenerationOptions
from npqwen.tools.parameter_value import Schemas

GREEDY = "greedy sampling makes Qwen3's thinking repeat itself without end; a temperature of 0.6 is advised"

Prompts = Callable[[list[Message]], tuple[list[int], list[str]]]
"""prompts(messages): the prompt's ids, and notices for the user."""


@dataclass(frozen=True)
class PreparedAnswer:
    """All that a driver needs to generate an answer to some messages.

    prompt_ids: checked, with room for at least one more token in the context.
    options: of the generation, checked. `stop` has only names of special tokens.
    stops: the other stop strings, which end the answer's text, but neither reasoning nor calls.
    schemas: the parameters of the tools on offer.
    notices: texts for the user, such as that a setting is advised against.
    """

    prompt_ids: list[int]
    options: GenerationOptions
    stops: list[str]
    schemas: Schemas
    notices: list[str]


def prepare(
    model: ChatModel, settings: ChatSettings, messages: Sequence[Message], prompts: Prompts | None = None
) -> PreparedAnswer:
    """Prepare an answer to `messages`, which are checked.

    prompts: makes the prompt; default: all messages as the model's template renders them. Raises what
    `ChatTemplate.render` and `check_prompt_ids` raise: OptionError, ContextLengthError.
    """
    options, notices = _with_defaults(model, settings, messages)
    special_ids, token_id = model.tokenizer.special_ids, model.tokenizer.token_id
    strings = list(options.get("stop") or ())
    special = [string for string in strings if token_id(string) in special_ids]
    options["stop"] = special
    if prompts is None:
        ids = settings.prompter(model).ids(list(messages))
    else:
        ids, new = prompts(list(messages))
        notices += new
    return PreparedAnswer(
        check_prompt_ids(model, ids),
        options,
        [string for string in strings if string not in special],
        {name: tool.parameters for name, tool in (settings.tools or {}).items()},
        notices,
    )


def _with_defaults(
    model: ChatModel, settings: ChatSettings, messages: Sequence[Message]
) -> tuple[GenerationOptions, list[str]]:
    """The caller's options, and for those left out the sampling advised with or without thinking; and notices."""
    own, given = model.generation_config.sampling, settings.generation
    template = settings.template_options.get("template")
    kind = model.chat_template.thinking(template, settings.tools is not None)
    thinking = thinks(kind, settings.thinking, messages)
    advised = default_sampling(own, kind, thinking)
    greedy = given.get("temperature", advised.temperature) == 0 or given.get("top_k", advised.top_k) == 1
    changed = {
        f.name: getattr(advised, f.name) for f in fields(own) if getattr(advised, f.name) != getattr(own, f.name)
    }
    options = cast(GenerationOptions, CHAT_DEFAULTS | changed | given)
    return options, [GREEDY] if thinking and greedy else []
