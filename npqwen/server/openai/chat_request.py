"""Converts the body of a chat completion into the library's request and the presentation of its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from npqwen.chat.begun_answer import BegunAnswer
from npqwen.chat.chat_options import ChatOptions
from npqwen.server.fields import FieldError, Fields
from npqwen.server.logprobs import TOP_LOGPROBS
from npqwen.server.openai.chat_messages import chat_messages
from npqwen.server.openai.generation_fields import choices, generation_options, include_usage
from npqwen.server.reasoning_fields import ReasoningFields, Shown, reasoning_fields
from npqwen.server.requests import ChatRequest
from npqwen.server.system_turns import with_allowed_system_turns
from npqwen.server.tool_fields import tool_options

if TYPE_CHECKING:
    from npqwen.model import Model

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@dataclass(frozen=True)
class ChatBody:
    """A checked body.

    fields: all of it. messages, options: as the library takes them, before the model is known. places: see
    `ChatRequest.fields`. include_usage, return_progress: events that a stream sends in addition to the answer's.
    """

    fields: Fields
    model: str | None
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    places: dict[str, str]
    reasoning: ReasoningFields
    n: int
    stream: bool
    include_usage: bool
    return_progress: bool

    @property
    def shown(self) -> Shown:
        """Where the reasoning is shown."""
        return self.reasoning.shown

    def request(self, model: Model) -> ChatRequest:
        """The request for this model; OptionError for fields that it does not support.

        Has the log name the body's unknown fields, among them variables that the model's chat template does not have.
        """
        options = self.options | self.reasoning.options(model, "tools" in self.options)
        self.fields.log_unknown()
        messages = with_allowed_system_turns(self.messages, model.chat_template)
        return ChatRequest(messages, cast(ChatOptions, options), self.n, self.places)


def chat_body(fields: Fields) -> ChatBody:
    """Read a body; FieldError for invalid or unsupported fields. Unknown fields are tolerated."""
    for name, neutral in _UNSUPPORTED.items():
        fields.refuse(name, "this server does not have it", *neutral)
    options, places = generation_options(fields)
    options |= tool_options(fields)
    if fields.flag("logprobs"):
        options["logprobs"] = True
    top = fields.whole("top_logprobs", 0, TOP_LOGPROBS)
    if top:
        if "logprobs" not in options:
            raise FieldError("top_logprobs needs logprobs: true", "top_logprobs")
        options["top_logprobs"] = top
    messages = chat_messages(fields)
    _check_ending(fields, messages)
    return ChatBody(
        fields=fields,
        model=fields.text("model"),
        messages=messages,
        options=options,
        places=places,
        reasoning=reasoning_fields(fields),
        n=choices(fields),
        stream=fields.flag("stream") or False,
        include_usage=include_usage(fields),
        return_progress=fields.flag("return_progress") or False,
    )


def _check_ending(fields: Fields, messages: list[dict[str, Any]]) -> None:
    """Check vLLM's two fields for whether the answer continues the last message: the messages alone decide that.

    FieldError if a field demands to continue a message that is not the assistant's or has calls, or to begin a new
    message after an answer that has begun.
    """
    begun = BegunAnswer.of(messages)
    for name, continues in (("continue_final_message", True), ("add_generation_prompt", False)):
        flag = fields.flag(name)
        if flag is continues and begun is None:
            raise FieldError(
                f"{name} is {json.dumps(flag)}, but the last message is not an assistant's without calls; there is "
                "nothing to continue",
                name,
            )
        if flag is (not continues) and begun:
            raise FieldError(
                f"{name} is {json.dumps(flag)}, but the last message is the assistant's, which is always continued; "
                "end with the user's",
                name,
            )
