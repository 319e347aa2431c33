"""What the bodies of /api/chat and /api/generate have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from npqwen.chat.chat_options import ChatOptions
from npqwen.errors import OptionError
from npqwen.server.duration import seconds
from npqwen.server.fields import FieldError, Fields
from npqwen.server.logprobs import TOP_LOGPROBS
from npqwen.server.ollama.options import Options, read_options
from npqwen.server.reasoning_fields import EFFORTS, ReasoningFields
from npqwen.server.requests import ChatRequest
from npqwen.server.system_turns import with_allowed_system_turns

if TYPE_CHECKING:
    from npqwen.chat.messages import Message
    from npqwen.model import Model

STRUCTURE_FIELD = {"schema": "format"}
"""The option that `format` becomes -> the field, for error messages."""
_LEVELS = tuple(EFFORTS)


@dataclass(frozen=True)
class Body:
    """A checked body.

    generation: options of the library that are not in `options`: structure and log-probabilities. keep_alive: seconds,
    negative: forever; None: the server's default.
    """

    model: str | None
    options: Options
    generation: dict[str, Any]
    reasoning: ReasoningFields
    keep_alive: float | None
    stream: bool

    def chat_request(self, model: Model, messages: list[Message], tools: dict[str, Any]) -> ChatRequest:
        """A request for an answer to messages. tools: options of the chat about tools. OptionError if unsupported."""
        options = {
            **self.options.generation,
            **self.generation,
            **self.reasoning.options(model, "tools" in tools),
            **tools,
        }
        allowed = with_allowed_system_turns(messages, model.chat_template)
        return ChatRequest(allowed, cast(ChatOptions, options), fields=STRUCTURE_FIELD)


def read_body(fields: Fields) -> Body:
    """The fields that both have in common; FieldError for invalid or unsupported ones."""
    return Body(
        model=fields.text("model") or fields.text("name"),
        options=read_options(fields),
        generation=_structure(fields) | _logprobs(fields),
        reasoning=_reasoning(fields),
        keep_alive=keep_alive(fields),
        stream=fields.flag("stream") is not False,
    )


def refuse_images(fields: Fields) -> None:
    """FieldError if an object has images."""
    if fields.items("images"):
        raise FieldError(f"{fields.place('images')} has images; this model reads text only", fields.place("images"))


def _structure(fields: Fields) -> dict[str, Any]:
    """The option `schema`, from `format`: "json" or a JSON schema."""
    format = fields.any("format")
    if format is None or format == "":
        return {}
    if format == "json":
        return {"schema": {"type": "object"}}
    if not isinstance(format, dict):
        fields.wrong("format", "json or a JSON schema, which is an object")
    return {"schema": format}


def _logprobs(fields: Fields) -> dict[str, Any]:
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, TOP_LOGPROBS)
    if not wanted:
        if top:
            raise FieldError("top_logprobs needs logprobs: true", "top_logprobs")
        return {}
    return {"logprobs": True, "top_logprobs": top} if top else {"logprobs": True}


def _reasoning(fields: Fields) -> ReasoningFields:
    """`think`: true, false, or a level, which limits the thinking."""
    think = fields.any("think")
    if think is None or isinstance(think, bool):
        return ReasoningFields(thinking=think)
    if think not in _LEVELS:
        fields.wrong("think", f"true, false or one of {', '.join(_LEVELS)}")
    return ReasoningFields(thinking=EFFORTS[think] != 0, effort=think)


def keep_alive(fields: Fields) -> float | None:
    """`keep_alive`: seconds, or a duration such as "5m"; negative: forever."""
    value = fields.any("keep_alive")
    if isinstance(value, str):
        try:
            return seconds(value)
        except OptionError as error:
            raise FieldError(f"keep_alive: {error}", "keep_alive") from None
    return fields.number("keep_alive", -1e9, 1e9)
