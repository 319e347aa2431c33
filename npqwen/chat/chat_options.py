"""What a chat takes beside its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from npqwen.chat.chat_model import ChatModel
from npqwen.chat.prompter import Prompter
from npqwen.errors import OptionError
from npqwen.generation.options import check_options
from npqwen.tools.toolbox import Tool, as_tools

MAX_STEPS = 8
"""Answers in a row that may call tools."""
_NOT_THE_TEMPLATES = ("messages", "tools", "thinking", "add_generation_prompt")


@dataclass(frozen=True)
class ChatOptions:
    """What `chat` takes beside messages, checked and ready. See `Model.chat`."""

    tools: dict[str, Tool] | None = None
    thinking: bool | None = None
    run_tools: bool = False
    max_steps: int = MAX_STEPS
    template_options: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        *,
        tools: Sequence[Any] | None = None,
        thinking: bool | None = None,
        run_tools: bool = False,
        max_steps: int = MAX_STEPS,
        template_options: Mapping[str, Any] | None = None,
        **generation: Any,
    ) -> ChatOptions:
        """Raises OptionError for what no model could be asked with; the rest is checked when there is a prompt."""
        known = as_tools(tools)
        if run_tools and not any(tool.function for tool in (known or {}).values()):
            raise OptionError("run_tools is set, but no tool is a Python function that could be run")
        if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
            raise OptionError(f"max_steps is {max_steps!r}; it must be a whole number, 1 or more")
        for name in ("cache", "cached"):
            if name in generation:
                raise OptionError(f"{name} is no option of a chat; a Session or a Conversation keeps the cache")
        if not isinstance(template_options, Mapping | None):
            raise OptionError(f"template_options is {template_options!r}; give a dictionary of what the template takes")
        for name in template_options or {}:
            if not isinstance(name, str) or name in _NOT_THE_TEMPLATES:
                raise OptionError(f"template_options has {name!r}, which is no option of a chat template")
        checked = check_options(generation)
        return cls(known, thinking, bool(run_tools), max_steps, dict(template_options or {}), checked)

    def prompter(self, model: ChatModel) -> Prompter:
        """What makes prompts with these options."""
        return Prompter(model, self.tools, self.thinking, self.template_options)

    def override(self, **changes: Any) -> ChatOptions:
        """These options with some changed, by the names that `of` takes."""
        own = {
            "tools": None if self.tools is None else list(self.tools.values()),
            **{name: getattr(self, name) for name in ("thinking", "run_tools", "max_steps", "template_options")},
        }
        return ChatOptions.of(**{**own, **self.generation, **changes})
