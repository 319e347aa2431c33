"""The messages of ollama's chats, as the library takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npqwen.server.fields import Fields
from npqwen.server.ollama.body import refuse_images
from npqwen.server.tool_results import matched

if TYPE_CHECKING:
    from npqwen.chat.messages import Message

_ROLES = ("system", "user", "assistant", "tool")


def read_messages(fields: Fields) -> list[Message]:
    """The field `messages`, possibly empty; results of tools are in the order of their calls if both have ids.

    A FieldError names the message and the problem.
    """
    return matched([_message(message) for message in fields.objects("messages") or []])


def _message(fields: Fields) -> Message:
    role = fields.required("role", lambda name: fields.one_of(name, _ROLES))
    refuse_images(fields)
    message: Message = {"role": role, "content": fields.text("content") or ""}
    if role == "assistant":
        if (thinking := fields.text("thinking")) is not None:
            message["reasoning_content"] = thinking
        if calls := fields.objects("tool_calls"):
            message["tool_calls"] = [_call(call) for call in calls]
    if role == "tool":
        name = fields.text("tool_name") or fields.text("name")
        given = {"name": name, "tool_call_id": fields.text("tool_call_id")}
        message |= {key: value for key, value in given.items() if value is not None}
    return message


def _call(fields: Fields) -> dict[str, Any]:
    function = fields.required("function", fields.object)
    name = function.required("name", function.text)
    arguments = function.any("arguments")
    if not isinstance(arguments, dict | str | None):
        function.wrong("arguments", "an object")
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    id = fields.text("id")
    return call if id is None else {"id": id, **call}
