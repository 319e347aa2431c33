"""Messages of a conversation: checks, and the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from npqwen.errors import OptionError
from npqwen.structure.json_values import plain
from npqwen.wording import quoted

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_SYSTEM = "developer"
"""The role that OpenAI's newer clients give the system message."""
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def checked(messages: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    """Copies of `messages`, checked and made of plain JSON values; a string is a single message of the user.

    A message is {"role": ..., "content": ...}. role: "system" (or "developer", which becomes "system"), "user",
    "assistant" or "tool". content: a string, or a list of {"type": "text", "text": ...}. An assistant's message may
    also have reasoning_content (or reasoning, or thinking), and tool_calls, a list of
    {"function": {"name": ..., "arguments": ...}} whose arguments are an object, a JSON string or None; with either,
    content may be absent. Keys whose value is None are ignored; other keys are passed on to the template.

    Raises an OptionError that names the message and the problem.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or isinstance(messages, bytes | bytearray):
        kind = type(messages).__name__
        raise OptionError(f"messages is of type {kind}; give a list such as [{{'role': 'user', 'content': 'Hello'}}]")
    if not messages:
        raise OptionError("the list of messages is empty; give at least one")
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise OptionError(f"{where} is of type {type(message).__name__}; give an object with a role and a content")
    checked = {key: value for key, value in plain(message, where).items() if value is not None}
    if checked.get("role") == _SYSTEM:
        checked["role"] = "system"
    role = checked.get("role")
    if role not in ROLES:
        raise OptionError(f"{where} has the role {quoted(role)}; it must be one of {', '.join(ROLES)}")
    reasoning = next((checked[key] for key in _REASONING_KEYS if key in checked), None)
    if role != "assistant":
        for key in ("tool_calls", "reasoning_content"):
            if checked.get(key):
                raise OptionError(f"{where} has {key}, which is allowed in an assistant's message only")
    elif reasoning is not None:
        if not isinstance(reasoning, str):
            raise OptionError(f"{where} has reasoning of type {type(reasoning).__name__}; it must be a string")
        checked["reasoning_content"] = reasoning
    if "tool_calls" in checked:
        _fit_calls(checked["tool_calls"], where)
    if "content" not in checked:
        if not checked.get("tool_calls") and reasoning is None:
            raise OptionError(f"{where}, with the role {role}, has no content")
        checked["content"] = ""
    _check_content(checked["content"], where)
    return checked


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise OptionError(f"{where} has content of type {type(content).__name__}; give a string (json.dumps for data)")
    for part in content:
        if not isinstance(part, dict):
            raise OptionError(f"{where} has a content part that is not an object like {{'type': 'text', 'text': ...}}")
        if part.get("type") != "text":
            raise OptionError(f"{where} has a content part of type {quoted(part.get('type'))}; Qwen3 reads text only")
        if not isinstance(part.get("text"), str):
            raise OptionError(f"{where} has a content part without text")


def _fit_calls(calls: Any, where: str) -> None:
    """Check a message's calls, and set missing arguments to {}."""
    if not isinstance(calls, list):
        raise OptionError(f"{where} has tool_calls of type {type(calls).__name__}; it must be a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise OptionError(f"{where} has a tool call without a function name")
        if function.get("arguments") is None:  # templates print them
            function["arguments"] = {}
        if not isinstance(function["arguments"], dict | str):
            name = quoted(function["name"])
            raise OptionError(f"{where} has a call of {name} with arguments that are neither an object nor a string")


def joined(message: Message) -> Message:
    """`message` with its content as one string, one line for each part."""
    if isinstance(message["content"], str):
        return message
    return message | {"content": "\n".join(part["text"] for part in message["content"])}
