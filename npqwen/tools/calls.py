"""Parsing of tool calls: JSON as Hermes and Qwen3 write them, or Qwen3-Coder's tags.

The format is recognized from the text. Mistakes of models whose meaning is clear are accepted: a missing closing tag or
brace, a number in quotes, an unescaped `&` (the tags are not XML). What cannot be read as a call is returned as text.
"""

from __future__ import annotations

import copy
import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npqwen.tools.parameter_value import JSON, Schemas, json_copy
from npqwen.tools.tagged_call import FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END, tagged_calls

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A tool call written by the model.

    id: unique among calls (see `call_id`); the model neither writes nor sees it.
    """

    name: str
    arguments: dict[str, Any]
    id: str = ""

    def as_message(self) -> dict[str, Any]:
        """The call as an entry of a message's `tool_calls`; `arguments` is an object, not a JSON string."""
        function = {"name": self.name, "arguments": copy.deepcopy(self.arguments)}
        return ({"id": self.id} if self.id else {}) | {"type": "function", "function": function}


def call_id(seed: int | None, prompt_ids: Sequence[int], index: int) -> str:
    """An id for the index-th call in the answer to a prompt: random, so that no two answers share one.

    With a seed, which makes the answer repeatable, the id is a hash of these three and repeatable, too.
    """
    if seed is None:
        return f"call_{secrets.token_hex(12)}"
    return f"call_{hashlib.sha256(repr((seed, list(prompt_ids), index)).encode()).hexdigest()[:24]}"


def read_calls(block: str, schemas: Schemas, *, complete: bool = True) -> tuple[list[ToolCall], str]:
    """The calls in the text between <tool_call> and </tool_call>, and the rest of that text.

    schemas: types of arguments written without quotes. complete: whether the model ended the block; if the text was
    cut off, unfinished calls are not accepted.
    """
    text = block.strip()
    fenced = _FENCE.match(text)
    if fenced is not None:
        text = fenced[1].strip()
    calls, rest = _tagged_calls(text, schemas, complete) if _is_tagged(text) else _json_calls(text, complete)
    return calls, rest if calls else text


def is_inside_value(block: str) -> bool:
    """Whether an unfinished block ends inside a value, where a closing tag would be part of that value."""
    if _is_tagged(block.lstrip()):
        marks = list(PARAMETER.finditer(block))
        if not marks:
            return False
        last = marks[-1].end()
        return PARAMETER_END not in block[last:] and FUNCTION_END not in block[last:]
    return _scan(block)[1]


def _is_tagged(text: str) -> bool:
    return text[:1] not in ("{", "[") and FUNCTION.search(text) is not None


# --- JSON ---


def _json_calls(text: str, complete: bool) -> tuple[list[ToolCall], str]:
    calls: list[ToolCall] = []
    rest = []
    while text := text.lstrip(" \t\r\n}],;"):
        start = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=len(text))
        rest.append(text[:start].rstrip())
        if not (text := text[start:]):
            break
        value, end = _first_value(text, complete)
        if new := _from_json(value):
            calls += new
        else:
            rest.append(text[:end].rstrip())
        text = text[end:]
    return calls, "\n".join(part for part in rest if part)


def _first_value(text: str, complete: bool) -> tuple[Any, int]:
    """The JSON value at the start of `text` and the index after it; (None, len(text)) if there is none.

    A complete text may lack closing brackets at its end.
    """
    try:
        value, end = JSON.raw_decode(text)
        return json_copy(value), end
    except (ValueError, RecursionError):
        pass
    closers, in_string = _scan(text)
    if complete and closers and not in_string:
        try:
            return json_copy(JSON.decode(text + closers)), len(text)
        except (ValueError, RecursionError):
            pass
    return None, len(text)


def _scan(text: str) -> tuple[str, bool]:
    """The closing brackets that JSON text lacks at its end, and whether it ends inside a string."""
    open_brackets: list[str] = []
    in_string = escaped = False
    for letter in text:
        if in_string:
            in_string = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            in_string = True
        elif letter in "{[":
            open_brackets.append("}" if letter == "{" else "]")
        elif letter in "}]" and open_brackets:
            open_brackets.pop()
    return "".join(reversed(open_brackets)), in_string


def _from_json(value: Any) -> list[ToolCall]:
    """The calls that a JSON value describes; none if it, or any item of a list, is not a call."""
    if isinstance(value, list):
        parts = [_from_json(item) for item in value]
        return [call for part in parts for call in part] if all(parts) else []
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json_copy(JSON.decode(arguments.strip() or "{}"))
        except (ValueError, RecursionError):
            return []
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        return []
    return [ToolCall(name.strip(), arguments)]


# --- Qwen3-Coder's tags ---


def _tagged_calls(text: str, schemas: Schemas, complete: bool) -> tuple[list[ToolCall], str]:
    calls: list[ToolCall] = []
    rest = []
    at = 0
    for call in tagged_calls(text, schemas):
        rest.append(text[at : call.start].strip())
        at = call.end
        if not call.name or not (call.closed or complete):
            rest.append(text[call.start : at].strip())
        else:
            calls.append(ToolCall(call.name, dict(call.arguments)))
    rest.append(text[at:].strip())
    return calls, "\n".join(part for part in rest if part)
