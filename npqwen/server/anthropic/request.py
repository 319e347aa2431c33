"""A body of the Messages API, in the library's own terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from npqwen.chat.chat_options import ChatOptions
from npqwen.server.anthropic.conversation import read_messages, read_tools
from npqwen.server.fields import FieldError, Fields
from npqwen.server.reasoning_fields import EFFORTS, ReasoningFields
from npqwen.server.requests import ChatRequest
from npqwen.server.system_turns import with_allowed_system_turns

if TYPE_CHECKING:
    from npqwen.model import Model

_CHOICES = {"auto": None, "any": "required", "none": "none"}
_FORMATS = ("json_schema",)


@dataclass(frozen=True)
class MessagesRequest:
    """A parsed body. omit_thinking: return thinking without its text. stream: send events, not one message."""

    chat: ChatRequest
    omit_thinking: bool
    stream: bool


def read_request(body: Fields, model: Model) -> MessagesRequest:
    """Parse a body of /v1/messages or of /v1/messages/count_tokens for a model.

    Unlike in Anthropic's own API, max_tokens may be absent: the answer then ends when it is complete or the context is
    full. Raises FieldError for invalid or unsupported fields, and OptionError for options that contradict each other.
    """
    tools = read_tools(body)
    thinking = body.object("thinking")
    format = _format(body)
    options: dict[str, Any] = {
        "tools": tools,
        "max_tokens": body.whole("max_tokens", 1),
        "stop": [string for string in body.stops("stop_sequences") or () if string] or None,
        "temperature": body.number("temperature", 0, 100),
        "top_p": body.number("top_p", 0, 1),
        "top_k": body.whole("top_k", 0),
        "schema": None if format is None else format.any("schema"),
        **_tool_choice(body, [tool["function"]["name"] for tool in tools or []]),
        **_thinking(body, thinking, model, tools is not None),
    }
    body.ignore("model", "metadata", "service_tier", "container", "mcp_servers", "context_management", "betas")
    request = MessagesRequest(
        ChatRequest(
            with_allowed_system_turns(read_messages(body), model.chat_template),
            cast(ChatOptions, {name: value for name, value in options.items() if value is not None}),
            fields={} if format is None else {"schema": format.place("schema")},
        ),
        thinking is not None and thinking.one_of("display", ("summarized", "omitted", "full")) == "omitted",
        bool(body.flag("stream")),
    )
    body.log_unknown()
    return request


def _format(body: Fields) -> Fields | None:
    """The field with the answer's JSON schema: either of the two that the API has used for it."""
    config = body.object("output_config")
    owner, name = (config, "format") if config is not None and "format" in config else (body, "output_format")
    format = owner.object(name)
    if format is None:
        return None
    format.required("type", lambda field: format.one_of(field, _FORMATS))
    format.required("schema", format.mapping)
    return format


def _tool_choice(body: Fields, tools: list[str]) -> dict[str, Any]:
    choice = body.object("tool_choice")
    if choice is None:
        return {}
    kind = choice.required("type", lambda name: choice.one_of(name, (*_CHOICES, "tool")))
    name = choice.required("name", choice.text) if kind == "tool" else _CHOICES[kind]
    if kind == "tool" and name not in tools:
        choice.wrong("name", f"one of the tools: {', '.join(tools) or 'there are none'}")
    if kind == "any" and not tools:
        raise FieldError("tool_choice is any, but there are no tools that this server knows", "tool_choice")
    parallel = choice.flag("disable_parallel_tool_use") is not True
    return {"tool_choice": name} | ({} if parallel or not tools else {"parallel_tool_calls": False})


def _thinking(body: Fields, thinking: Fields | None, model: Model, tools: bool) -> dict[str, Any]:
    """Whether and how long the model thinks: as in Anthropic's API, not at all unless that is requested.

    "adaptive" leaves it to the model, within the budget of output_config.effort. For a model that never thinks, any
    budget is valid.
    """
    config = body.object("output_config")
    effort = None if config is None else config.one_of("effort", tuple(EFFORTS))
    kind = None if thinking is None else thinking.required("type", lambda name: thinking.one_of(name, _KINDS))
    can = model.chat_template.thinking(None, tools)
    wants: bool | None = None
    budget: int | None = None
    if kind == "enabled":
        assert thinking is not None
        budget = thinking.required("budget_tokens", lambda name: thinking.whole(name, 0))
        wants = True
    elif kind != "adaptive" and (kind == "disabled" or can == "switch"):
        wants = False
    if can == "never":
        return {}
    fields = ReasoningFields(thinking=wants, budget=budget, effort=effort if kind == "adaptive" else None)
    return fields.options(model, tools)


_KINDS = ("enabled", "disabled", "adaptive")
