"""The fields, of all dialects, for whether and how long a model thinks, and whether its reasoning is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from npqwen.errors import OptionError
from npqwen.generation.thinking import CLOSE
from npqwen.server.fields import FieldError, Fields

if TYPE_CHECKING:
    from npqwen.model import Model

EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 0,
    "low": 1024,
    "medium": 4096,
    "high": 16384,
    "xhigh": None,
    "max": None,
}
"""Thinking budgets in tokens for each `reasoning_effort`; 0: no thinking, None: no limit."""

GRADES = {"low": "low", "medium": "medium", "high": "xhigh", "xhigh": "xhigh", "max": "xhigh"}
"""For each effort with thinking, the value of the variable `reasoning_effort` of templates that have it (Qwen3.8)."""

_SWITCHES = ("enable_thinking", "thinking")
"""Names under which a variable turns thinking on or off."""

_NOT_VARIABLES = ("add_generation_prompt", "messages", "self", "tools")
"""Names that are no variables of a chat template, or have a field of their own."""

Shown = Literal["apart", "inline", "hidden"]
"""Where reasoning is shown: as `reasoning_content`, in the content between <think> tags, or nowhere."""


@dataclass(frozen=True)
class ReasoningFields:
    """A body's fields about reasoning; None where the body sets none.

    thinking: whether to think. budget: most tokens of thinking. effort: one of `EFFORTS`. variables: an object whose
    fields are variables of chat templates; those that a model's template does not have are never read.
    """

    thinking: bool | None = None
    budget: int | None = None
    effort: str | None = None
    shown: Shown = "apart"
    variables: Fields = field(default_factory=lambda: Fields({}))

    def options(self, model: Model, tools: bool) -> dict[str, Any]:
        """The options of a chat with this model that implement the fields. tools: whether the chat has any.

        For a model that always thinks, thinking is turned off by a budget of 0. An effort is passed to the template if
        it has a variable for it; otherwise it sets a budget, but does not turn thinking on, so that it is valid for
        models that never think, too. Raises OptionError if thinking is requested of a model that never thinks.
        """
        template = self.variables.any("template")
        name = template if isinstance(template, str) else None
        mode = model.chat_template.mode(name, tools)
        known = {"template", *model.chat_template.variables(name, tools)}.difference(_SWITCHES)
        template_options = {one: self.variables.any(one) for one in sorted(known) if one in self.variables}
        kind, thinking, budget = mode.thinking, self.thinking, self.budget
        if budget is None and self.effort is not None and thinking is not False:
            limit = EFFORTS[self.effort]
            if limit == 0:
                thinking = False if thinking is None else thinking
            elif mode.graded:
                template_options = {"reasoning_effort": GRADES[self.effort]} | template_options
            elif model.tokenizer.token_id(CLOSE) is not None:
                budget = limit
        if budget == 0 and thinking is None:
            thinking = False
        if thinking is False and kind == "always":
            thinking, budget = None, 0
        if thinking is False and kind == "never":
            thinking, budget = None, None
        if thinking is True and kind == "never":
            raise OptionError("this model does not think; leave out the fields that tell it to")
        options: dict[str, Any] = {"thinking": thinking, "thinking_budget": budget}
        if template_options:
            options["template_options"] = template_options
        return {name: value for name, value in options.items() if value is not None}


def reasoning_fields(fields: Fields) -> ReasoningFields:
    """The fields about reasoning in a body; FieldError for invalid values.

    Of fields with the same meaning, the more direct one wins: `thinking_budget` over `reasoning.max_tokens`, and a
    budget over an effort.
    """
    flags = [fields.flag("enable_thinking")]
    budgets = [_budget(fields, name) for name in ("thinking_budget", "thinking_budget_tokens", "reasoning_budget")]
    efforts = [_effort(fields, "reasoning_effort")]
    hidden = fields.flag("include_reasoning") is False

    kwargs = fields.object("chat_template_kwargs") or Fields({})
    for name in _NOT_VARIABLES:
        if name in kwargs:
            place = kwargs.place(name)
            raise FieldError(f"{place} is not a variable that may be set; leave it out", place)
    flags += [kwargs.flag(name) for name in _SWITCHES]
    reasoning = fields.object("reasoning")
    if reasoning is not None:
        flags.append(reasoning.flag("enabled"))
        budgets.append(_budget(reasoning, "max_tokens"))
        efforts.append(_effort(reasoning, "effort"))
        hidden = hidden or reasoning.flag("exclude") is True
        reasoning.ignore("summary", "generate_summary")
    thinking = fields.object("thinking")
    if thinking is not None:
        kind = thinking.required("type", lambda name: thinking.one_of(name, ("enabled", "disabled", "adaptive")))
        flags.append({"enabled": True, "disabled": False}.get(kind))
        budgets.append(_budget(thinking, "budget_tokens"))
    format = fields.one_of("reasoning_format", ("none", "deepseek", "auto"))
    return ReasoningFields(
        thinking=next((flag for flag in flags if flag is not None), None),
        budget=next((budget for budget in budgets if budget is not None), None),
        effort=next((effort for effort in efforts if effort is not None), None),
        shown="hidden" if hidden else "inline" if format == "none" else "apart",
        variables=kwargs,
    )


def _budget(fields: Fields, name: str) -> int | None:
    """A thinking budget in tokens; None if the field is absent or -1, which means no limit."""
    budget = fields.whole(name, -1)
    return None if budget == -1 else budget


def _effort(fields: Fields, name: str) -> str | None:
    return fields.one_of(name, tuple(EFFORTS))
