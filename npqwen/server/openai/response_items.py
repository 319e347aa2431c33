"""The input of a body of the Responses API as messages."""

from __future__ import annotations

import json
import logging
from typing import Any

from npqwen.chat.messages import Message
from npqwen.server.fields import FieldError, Fields
from npqwen.server.opaque_reasoning import unpack
from npqwen.server.openai.response_tools import ClientTool
from npqwen.server.tool_results import matched
from npqwen.wording import quoted

_log = logging.getLogger(__name__)

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_UNREADABLE = ("input_image", "input_file", "input_audio")


def read_messages(body: Fields, items: list[Fields] | None) -> list[Message]:
    """The instructions as a system message, and the input's messages. items: the input's, None if it is a text.

    The parts of one answer (reasoning, text, calls) become one message. Items that only OpenAI's servers know are
    skipped. Raises FieldError for content that the model cannot read, such as images.
    """
    messages: list[Message] = []
    if instructions := body.text("instructions"):
        messages.append({"role": "system", "content": instructions})
    if items is None:
        messages.append({"role": "user", "content": body.required("input", body.text)})
    for item in items or []:
        _add(messages, item)
    messages = [message for message in messages if not _is_reasoning_only(message)]
    if all(message["role"] == "system" for message in messages):
        raise FieldError("input has no message", "input")
    return matched(messages)


def _is_reasoning_only(message: Message) -> bool:
    return "reasoning_content" in message and not message["content"] and "tool_calls" not in message


def _add(messages: list[Message], item: Fields) -> None:
    kind = item.text("type") or ("message" if "role" in item else item.required("type", item.text))
    if kind == "message":
        _add_message(messages, item)
    elif kind == "reasoning":
        if reasoning := _reasoning(item):
            messages.append({"role": "assistant", "content": "", "reasoning_content": reasoning})
    elif kind in ("function_call", "custom_tool_call"):
        tool = ClientTool(item.required("name", item.text), item.text("namespace"), kind == "custom_tool_call")
        function = {"name": tool.model_name, "arguments": _arguments(item, tool)}
        call = {"id": _call_id(item), "type": "function", "function": function}
        _answer(messages).setdefault("tool_calls", []).append(call)
    elif kind in ("function_call_output", "custom_tool_call_output"):
        item.required("output", item.any)
        messages.append({"role": "tool", "tool_call_id": _call_id(item), "content": _text(item, "output")})
    elif kind == "item_reference":
        raise FieldError(f"{item.path} refers to a stored item, but nothing is stored here; send the item", item.path)
    else:
        _log.debug("%s of type %s was skipped", item.path, quoted(kind))


def _add_message(messages: list[Message], item: Fields) -> None:
    role = item.required("role", lambda name: item.one_of(name, _ROLES))
    item.required("content", item.any)
    text = _text(item, "content")
    last = _answer(messages) if role == "assistant" else None
    if last is not None and (not last["content"] or "tool_calls" in last):
        last["content"] += text
    elif last is not None:
        messages.append({"role": role, "content": text})
    else:
        messages.append({"role": "system" if role == "developer" else role, "content": text})


def _answer(messages: list[Message]) -> Message:
    """The assistant's message at the end of `messages`, to be extended; appends a new one if there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _reasoning(item: Fields) -> str:
    """The reasoning of an item: its text, or what this server packed into it, or else its summary."""
    return _text(item, "content") or unpack(item.text("encrypted_content") or "") or _text(item, "summary")


def _call_id(item: Fields) -> str:
    return item.required("call_id", item.text)


def _arguments(item: Fields, tool: ClientTool) -> Any:
    """A call's arguments: the text itself if it is a JSON object, so that its tokens match those in the cache.

    Other text, as of an unfinished call, becomes the value of an argument, so that the conversation can continue.
    """
    if tool.custom:
        return tool.arguments(item.text("input") or "")
    text = item.text("arguments") or "{}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return text if isinstance(value, dict) else {"arguments": text}


def _text(fields: Fields, name: str) -> str:
    """A text, or the texts of parts, joined by newlines; "" if the field is absent."""
    value = fields.any(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return fields.text(name) or ""
    if not isinstance(value, list):
        fields.wrong(name, "text or a list of parts")
    return "\n".join(text for part in fields.objects(name) or [] if (text := _part(part)) is not None)


def _part(part: Fields) -> str | None:
    kind = part.required("type", part.text)
    if kind in _TEXTS:
        return part.required("text", part.text)
    if kind == "refusal":
        return part.required("refusal", part.text)
    if kind in _UNREADABLE:
        raise FieldError(f"{part.path} has the type {kind}, and Qwen3 reads text only; leave it out", part.path)
    _log.debug("%s of type %s was skipped", part.path, quoted(kind))
    return None
