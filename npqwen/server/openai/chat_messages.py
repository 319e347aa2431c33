"""Converts messages of OpenAI's clients into the library's."""

from __future__ import annotations

from typing import Any

from npqwen.server.fields import FieldError, Fields
from npqwen.server.tool_results import matched
from npqwen.wording import quoted

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_KEPT = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The types of parts that are text, and the key that holds it."""


def chat_messages(fields: Fields) -> list[dict[str, Any]]:
    """The field `messages`, converted; results of tools are in the order of their calls.

    A FieldError names the message and the problem.
    """
    messages = fields.required("messages", fields.objects)
    if not messages:
        raise FieldError("messages is empty; send at least one message", "messages")
    return matched([_message(message) for message in messages])


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.required("role", lambda name: fields.one_of(name, _ROLES))
    role = {"developer": "system", "function": "tool"}.get(role, role)
    content = _content(fields)
    message: dict[str, Any] = {"role": role}
    if role == "assistant":
        for name in _KEPT:
            if isinstance(fields.any(name), str) and "reasoning_content" not in message:
                message["reasoning_content"] = fields.text(name)
        if calls := fields.objects("tool_calls"):
            message["tool_calls"] = [_call(call) for call in calls]
        fields.refuse("function_call", "send tool_calls")
    if role == "tool":
        message |= {name: text for name in ("tool_call_id", "name") if (text := fields.text(name)) is not None}
    if content is None:
        if role not in ("assistant", "tool"):
            raise FieldError(f"{fields.place('content')} is missing", fields.place("content"))
        content = ""
    fields.ignore("name", "refusal", "audio", "annotations", "id")
    return message | {"content": content}


def _content(fields: Fields) -> str | list[dict[str, Any]] | None:
    content = fields.any("content")
    if content is None or isinstance(content, str):
        return fields.text("content")
    if not isinstance(content, list):
        fields.wrong("content", "text or a list of parts")
    return [_part(part, f"{fields.place('content')}[{at}]") for at, part in enumerate(content)]


def _part(part: Any, place: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise FieldError(f"{place} is {quoted(part)}; it must be a part such as {{'type': 'text', ...}}", place)
    fields = Fields(part, place)
    kind = fields.required("type", fields.text)
    if kind not in _TEXT_PARTS:
        raise FieldError(f"{place} is a part of type {quoted(kind)}; the model reads text only", place)
    return {"type": "text", "text": fields.required(_TEXT_PARTS[kind], fields.text)}


def _call(fields: Fields) -> dict[str, Any]:
    function = fields.required("function", fields.object)
    name = function.required("name", function.text)
    arguments = function.any("arguments")
    if not isinstance(arguments, str | dict | None):
        function.wrong("arguments", "text of JSON, or an object")
    id = fields.text("id")
    fields.ignore("type", "index")
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if id is None else {"id": id, **call}
