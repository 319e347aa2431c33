"""The messages of a conversation, checked, in the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from npqwen.errors import OptionError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MOST_LEVELS = 128
"""Of values within values: templates recurse. A call that a model writes has fewer (`tool_calls`)."""


def checked(messages: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    """Copies of `messages`, made of plain JSON values; a string is one message of the user.

    A message is {"role", "content"}. role: system, user, assistant or tool. content: a string, or a list of
    {"type": "text", "text": ...}. An assistant's may also have reasoning_content (or reasoning, or thinking), and
    tool_calls of the form {"function": {"name", "arguments"}} with an object, a JSON string or None as arguments; with
    either, it needs no content. Keys that are None are as good as absent; further keys are for the template.

    Raises OptionError that names the message and what is wrong with it.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or isinstance(messages, bytes | bytearray):
        kind = type(messages).__name__
        raise OptionError(f"messages is {kind}; give a list such as [{{'role': 'user', 'content': 'Hello'}}]")
    if not messages:
        raise OptionError("there are no messages; give at least one")
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def plain(value: Any, where: str) -> Any:
    """A copy of a JSON value in plain types; OptionError for anything that is none.

    Chat templates are foreign programs: they get no object with methods of its own.
    """
    return _plain(value, where, _MOST_LEVELS)


def _plain(value: Any, where: str, levels: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping | list | tuple) and not levels:
        raise OptionError(f"{where[:60]}... is nested more than {_MOST_LEVELS} levels deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise OptionError(f"{where} has a key that is no string")
        texts = {_text(key, f"a key of {where}"): item for key, item in value.items()}
        return {key: _plain(item, f"{where}[{key!r}]", levels - 1) for key, item in texts.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{at}]", levels - 1) for at, item in enumerate(value)]
    raise OptionError(f"{where} is {type(value).__name__}, which is no JSON value")


def _text(value: str, where: str) -> str:
    """The characters of a string, without what its class makes of them, such as an enum's name."""
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{where} is no valid Unicode: it holds half a surrogate pair") from None
    return text


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise OptionError(f"{where} is {type(message).__name__}, not an object with a role and a content")
    checked = {key: value for key, value in plain(message, where).items() if value is not None}
    role = checked.get("role")
    if role not in ROLES:
        raise OptionError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}")
    reasoning = next((checked[key] for key in _REASONING if key in checked), None)
    if role != "assistant":
        for key in ("tool_calls", "reasoning_content"):
            if checked.get(key):
                raise OptionError(f"{where} has {key}, which only an assistant's message may have")
    elif reasoning is not None:
        if not isinstance(reasoning, str):
            raise OptionError(f"{where} has reasoning of {type(reasoning).__name__}, not a string")
        checked["reasoning_content"] = reasoning
    if "tool_calls" in checked:
        _fit_calls(checked["tool_calls"], where)
    if "content" not in checked:
        if not checked.get("tool_calls") and reasoning is None:
            raise OptionError(f"{where}, of the role {role}, has no content")
        checked["content"] = ""
    _check_content(checked["content"], where)
    return checked


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise OptionError(f"{where} has a content of {type(content).__name__}; give a string (json.dumps of data)")
    for part in content:
        if not isinstance(part, dict):
            raise OptionError(f"{where} has a content part that is no object such as {{'type': 'text', 'text': ...}}")
        if part.get("type") != "text":
            raise OptionError(f"{where} has a content part of type {part.get('type')!r}; Qwen3 reads text only")
        if not isinstance(part.get("text"), str):
            raise OptionError(f"{where} has a content part without text")


def _fit_calls(calls: Any, where: str) -> None:
    """Check the calls of a message, and give those without arguments empty ones."""
    if not isinstance(calls, list):
        raise OptionError(f"{where} has tool_calls of {type(calls).__name__}, not a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise OptionError(f"{where} has a tool call without a function's name")
        if function.get("arguments") is None:  # templates need them
            function["arguments"] = {}
        if not isinstance(function["arguments"], dict | str):
            raise OptionError(
                f"{where} has a call of {function['name']} whose arguments are neither an object nor a JSON string"
            )


def joined(message: Message) -> Message:
    """The same message with its content in one string, its parts a line each."""
    if isinstance(message["content"], str):
        return message
    return message | {"content": "\n".join(part["text"] for part in message["content"])}
