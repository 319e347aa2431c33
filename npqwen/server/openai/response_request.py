"""A body of the Responses API, in the library's own terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from npqwen.chat.chat_options import ChatOptions
from npqwen.server.fields import FieldError, Fields
from npqwen.server.openai.response_items import read_messages
from npqwen.server.openai.response_tools import ClientTools, read_tool_choice, read_tools
from npqwen.server.reasoning_fields import reasoning_fields
from npqwen.server.requests import ChatRequest
from npqwen.server.system_turns import with_allowed_system_turns

if TYPE_CHECKING:
    from npqwen.model import Model

_SEND_ALL = "nothing is stored here; send the whole conversation in input"
_TOLERATED = (
    "model",
    "client_metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "truncation",  # an input that is too long is refused in any case
    "user",
)
_ECHOED = ("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "temperature", "top_p", "user")


@dataclass(frozen=True)
class ResponsesRequest:
    """A parsed body.

    tools: those that the model may call. summary: return reasoning as its own summary, which clients show, not as raw
    text. echo: the fields that a response repeats. stream: send events, not one response.
    """

    chat: ChatRequest
    tools: ClientTools
    summary: bool
    echo: dict[str, Any]
    stream: bool


def read_request(body: Fields, model: Model) -> ResponsesRequest:
    """Parse a body of /v1/responses or of /v1/responses/input_tokens for a model.

    Raises FieldError for invalid or unsupported fields, and OptionError for options that contradict each other.
    """
    body.refuse("previous_response_id", _SEND_ALL)
    body.refuse("conversation", _SEND_ALL)
    body.refuse("prompt", "no prompts are stored here; send instructions and input")
    body.refuse("background", "leave it out, and stream the response", False)
    body.refuse("top_logprobs", "/v1/chat/completions has log-probabilities", 0)
    items = body.objects("input") if isinstance(body.any("input"), list) else None
    lists = [body.objects("tools") or []]
    lists += [item.objects("tools") or [] for item in items or [] if item.any("type") == "additional_tools"]
    tools, choice = read_tool_choice(body, read_tools(lists))
    parallel = body.flag("parallel_tool_calls")
    options: dict[str, Any] = {
        "tools": tools.schemas or None,
        "tool_choice": choice,
        "parallel_tool_calls": False if parallel is False and tools.by_name else None,
        "max_tokens": body.whole("max_output_tokens", 1),
        "temperature": body.number("temperature", 0, 100),
        "top_p": body.number("top_p", 0, 1),
        "schema": _schema(body),
        **reasoning_fields(body).options(model, bool(tools.by_name)),
    }
    _check_include(body)
    body.ignore(*_TOLERATED)
    request = ResponsesRequest(
        ChatRequest(
            with_allowed_system_turns(read_messages(body, items), model.chat_template),
            cast(ChatOptions, {name: value for name, value in options.items() if value is not None}),
            fields={"schema": "text.format.schema"},
        ),
        tools,
        _wants_summary(body),
        _echo(body),
        bool(body.flag("stream")),
    )
    body.log_unknown()
    return request


def _check_include(body: Fields) -> None:
    include = body.items("include") or []
    if not all(isinstance(name, str) for name in include):
        body.wrong("include", "a list of strings")
    if "message.output_text.logprobs" in include:
        problem = "include has message.output_text.logprobs; /v1/chat/completions has log-probabilities"
        raise FieldError(problem, "include")


def _schema(body: Fields) -> Any:
    text = body.object("text")
    if text is None:
        return None
    text.refuse("verbosity", "say in the instructions how long answers should be", "medium")
    format = text.object("format")
    if format is None:
        return None
    kind = format.required("type", lambda name: format.one_of(name, ("text", "json_object", "json_schema")))
    if kind == "json_schema":
        format.ignore("name", "description", "strict")
        return format.required("schema", format.mapping)
    return {"type": "object"} if kind == "json_object" else None


def _wants_summary(body: Fields) -> bool:
    reasoning = body.object("reasoning")
    if reasoning is None:
        return False
    kinds = ("auto", "concise", "detailed", "none")
    older = reasoning.one_of("generate_summary", kinds)
    return (reasoning.one_of("summary", kinds) or older or "none") != "none"


def _echo(body: Fields) -> dict[str, Any]:
    """The fields of a response that repeat the request's; every response has them."""
    text, reasoning = body.any("text") or {}, body.any("reasoning") or {}
    echo = {name: body.any(name) for name in _ECHOED}
    parallel = echo["parallel_tool_calls"]
    return echo | {
        "metadata": echo["metadata"] or {},
        "parallel_tool_calls": True if parallel is None else parallel,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "store": False,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": body.any("tool_choice") or "auto",
        "tools": body.any("tools") or [],
        "truncation": "disabled",
    }
