"""The options of a chat: those of generation, and those for tools, thinking and the chat template."""

# No `from __future__ import annotations`: `CHAT_OPTIONS` reads these annotations.

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, cast

from npqwen.chat.call_structure import find_tools
from npqwen.chat.chat_model import ChatModel
from npqwen.chat.prompter import Prompter
from npqwen.checks import suggestion
from npqwen.errors import OptionError
from npqwen.generation.option import Option, option_table
from npqwen.generation.options import ELSEWHERE, OPTIONS, GenerationOptions, check_options
from npqwen.tools.toolbox import Tool, as_tools
from npqwen.wording import quoted

_NOT_FOR_TEMPLATES = ("messages", "tools", "thinking", "add_generation_prompt")


def _check_tools(name: str, value: Any) -> list[Tool]:
    return list((as_tools(value) or {}).values())


def _check_tool_choice(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name} is {quoted(value)}; it must be auto, none, required or a tool's name")
    return value


def _check_thinking(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {quoted(value)}; it must be True, False or None")
    return value


def _check_template_options(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name} is {quoted(value)}; it must be a dictionary of variables of the chat template")
    for key in value:
        if not isinstance(key, str) or key in _NOT_FOR_TEMPLATES:
            raise OptionError(f"{name} has {quoted(key)}, which is not an option of a chat template")
    return dict(value)


class ChatOptions(GenerationOptions, total=False):
    """The options of `Model.chat`, `Model.stream_chat` and `Model.conversation`: these, and those of generation.

    None has the same effect as leaving an option out. Differences from plain generation: `stop` strings end the
    answer's text and may occur in reasoning and calls; sampling defaults to the values that the model's authors
    recommend with or without thinking; `loop_guard` is on by default.
    """

    tools: Annotated[
        Sequence[Callable[..., Any] | Mapping[str, Any] | Tool] | None,
        Option("Functions with hints and docstrings, or JSON schemas, that the model may call.", validate=_check_tools),
    ]
    tool_choice: Annotated[
        str | None,
        Option(
            "auto: the model chooses; none: no call; required: at least one; or the name of the tool to call.",
            str,
            default="auto",
            validate=_check_tool_choice,
        ),
    ]
    parallel_tool_calls: Annotated[
        bool | None, Option("Whether an answer may have more than one call.", bool, default=True)
    ]
    thinking: Annotated[
        bool | None,
        Option("Whether the model thinks first; default: that of its chat template.", bool, validate=_check_thinking),
    ]
    run_tools: Annotated[
        bool | None,
        Option("Run the model's tool calls, and let it continue with their results.", bool),
    ]
    max_steps: Annotated[
        int | None, Option("With run_tools, at most N answers in a row.", int, 1, default=8)
    ]
    template_options: Annotated[
        Mapping[str, Any] | None,
        Option("Variables of the chat template; `template` chooses one by name.", validate=_check_template_options),
    ]


CHAT_OPTIONS = option_table(ChatOptions, inherited=OPTIONS)
"""The options that only a chat has, by name."""


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """Checked options of a chat."""

    tools: dict[str, Tool] | None
    tool_choice: str
    parallel_tool_calls: bool
    thinking: bool | None
    run_tools: bool
    max_steps: int
    template_options: dict[str, Any]
    generation: GenerationOptions

    @classmethod
    def of(cls, options: ChatOptions) -> "ChatSettings":
        """Check `options`.

        Raises OptionError for options that are invalid for every model; others are rejected when the prompt is built.
        """
        for name in options:
            if name in ("cache", "cached"):
                raise OptionError(f"{name} is not an option of a chat; a Session or a Conversation keeps the cache")
            if name == "n":
                raise OptionError("n is an option of model.chat; fork() a conversation for several answers")
            if name not in CHAT_OPTIONS and name not in OPTIONS:
                hint = suggestion(name, [*CHAT_OPTIONS, *OPTIONS], ELSEWHERE)
                raise OptionError(f"unknown option {quoted(name)}; {hint}")
        given: dict[str, Any] = {
            name: CHAT_OPTIONS[name].check(value)
            for name, value in options.items()
            if name in CHAT_OPTIONS and value is not None
        }
        tools = {tool.name: tool for tool in given["tools"]} if "tools" in given else None
        run_tools = given.get("run_tools", False)
        if run_tools and not any(tool.function for tool in (tools or {}).values()):
            raise OptionError("run_tools is set, but no tool is a Python function")
        choice = given.get("tool_choice", CHAT_OPTIONS["tool_choice"].default)
        if choice not in ("auto", "none"):
            find_tools(tools, choice)
        return cls(
            tools,
            choice,
            given.get("parallel_tool_calls", CHAT_OPTIONS["parallel_tool_calls"].default),
            given.get("thinking"),
            run_tools,
            given.get("max_steps", CHAT_OPTIONS["max_steps"].default),
            given.get("template_options", {}),
            check_options({name: value for name, value in options.items() if name in OPTIONS}),
        )

    @property
    def reader_ends(self) -> bool:
        """Whether an answer may end before its text does: at a stop string, or after its only call. Only the reader of
        the text detects that, and in a batch, generation runs ahead of it."""
        return bool(self.generation.get("stop")) or (self.tools is not None and not self.parallel_tool_calls)

    def prompter(self, model: ChatModel) -> Prompter:
        """A `Prompter` with these settings."""
        return Prompter(model, self.tools, self.thinking, self.template_options)

    def override(self, changes: ChatOptions) -> "ChatSettings":
        """These settings with some options changed; None resets an option to its default."""
        own: dict[str, Any] = {name: getattr(self, name) for name in CHAT_OPTIONS}
        own["tools"] = None if self.tools is None else list(self.tools.values())
        return ChatSettings.of(cast(ChatOptions, {**own, **self.generation, **changes}))
