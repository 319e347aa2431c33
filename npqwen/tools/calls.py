"""The calls of tools that a model writes: JSON as Hermes and Qwen3 do, or Qwen3-Coder's tags.

Which of the two it is follows from what was written. Models make mistakes that a reader can see through: a closing
tag or brace that is missing, a number in quotes, an unescaped `&`. Those are read as they are meant; nothing here is
XML. What makes no sense as a call is given back as text.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's parameters, by the tool's name."""

_FUNCTION = re.compile(r"<function=([^>\n]*)>")
_FUNCTION_END = "</function>"
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>")
_PARAMETER_END = "</parameter>"
_NEXT_LINE = re.compile(r"\n[ \t]*(?=<parameter=[^>\n]*>|</function>)")
_NEXT = re.compile(r"<parameter=[^>\n]*>|</function>")
_MARK = re.compile(r"<parameter=[^>\n]*>|</function>|<function=[^>\n]*>")
_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\s*\Z", re.DOTALL)
_JSON = json.JSONDecoder(strict=False)  # newlines within strings are a common slip
_MOST_LEVELS = 100
"""Of values within values: no call that is meant has more, and what reads on recurses."""


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants called.

    id tells the calls of one conversation apart; the model neither writes nor sees it.
    """

    name: str
    arguments: dict[str, Any]
    id: str = ""

    def as_message(self) -> dict[str, Any]:
        """The call as an entry of a message's `tool_calls`."""
        function = {"name": self.name, "arguments": copy.deepcopy(self.arguments)}
        return ({"id": self.id} if self.id else {}) | {"type": "function", "function": function}


def read_calls(block: str, schemas: Schemas, *, whole: bool = True) -> tuple[list[ToolCall], str]:
    """The calls in what stands between <tool_call> and </tool_call>, and the text that is none of them.

    whole: the block is known to be finished. If the text broke off in it, only what is complete is a call.
    """
    text = block.strip()
    fenced = _FENCE.match(text)
    if fenced is not None:
        text = fenced[1].strip()
    calls, rest = _tagged_calls(text, schemas, whole) if _is_tagged(text) else _json_calls(text, whole)
    return calls, rest if calls else text


def is_inside_value(block: str) -> bool:
    """Whether the end of an unfinished block lies within a value, where a tag is but a part of the value."""
    if _is_tagged(block.lstrip()):
        marks = list(_PARAMETER.finditer(block))
        if not marks:
            return False
        last = marks[-1].end()
        return _PARAMETER_END not in block[last:] and _FUNCTION_END not in block[last:]
    return _scan(block)[1]


def _is_tagged(text: str) -> bool:
    return text[:1] not in ("{", "[") and _FUNCTION.search(text) is not None


# --- JSON ---


def _json_calls(text: str, whole: bool) -> tuple[list[ToolCall], str]:
    calls: list[ToolCall] = []
    rest = []
    while text := text.lstrip(" \t\r\n}],;"):
        start = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=len(text))
        rest.append(text[:start].rstrip())
        if not (text := text[start:]):
            break
        value, end = _first_value(text, whole)
        found = _from_json(value)
        if not found:
            rest.append(text[:end].rstrip())
        calls += found
        text = text[end:]
    return calls, "\n".join(part for part in rest if part)


def _first_value(text: str, whole: bool) -> tuple[Any, int]:
    """The JSON value at the start of `text` and where it ends; None and the end of the text for what is none."""
    try:
        value, end = _JSON.raw_decode(text)
        return _encodable(value), end
    except (ValueError, RecursionError):
        pass
    closers, in_string = _scan(text)
    if whole and closers and not in_string:
        try:
            return _encodable(_JSON.decode(text + closers)), len(text)
        except (ValueError, RecursionError):
            pass
    return None, len(text)


def _scan(text: str) -> tuple[str, bool]:
    """The brackets that are still to be closed at the end of JSON text, and whether it ends within a string."""
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
    """The calls that a JSON value states; none if it, or any of a list, is not a call."""
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
            arguments = _encodable(_JSON.decode(arguments.strip() or "{}"))
        except (ValueError, RecursionError):
            return []
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        return []
    return [ToolCall(name.strip(), arguments)]


# --- Qwen3-Coder's tags ---


def _tagged_calls(text: str, schemas: Schemas, whole: bool) -> tuple[list[ToolCall], str]:
    calls: list[ToolCall] = []
    rest = []
    at = 0
    while (start := _FUNCTION.search(text, at)) is not None:
        rest.append(text[at : start.start()].strip())
        name = start[1].strip(" \t\"'")
        properties = schemas.get(name, {}).get("properties")
        arguments, at, finished = _parameters(text, start.end(), properties if isinstance(properties, Mapping) else {})
        if not name or not (finished or whole):
            rest.append(text[start.start() : at].strip())
        else:
            calls.append(ToolCall(name, arguments))
    rest.append(text[at:].strip())
    return calls, "\n".join(part for part in rest if part)


def _parameters(text: str, at: int, properties: Mapping[str, Any]) -> tuple[dict[str, Any], int, bool]:
    """The arguments of the function whose tag ends at `at`, where it ends, and whether its end was written."""
    arguments: dict[str, Any] = {}
    while (mark := _MARK.search(text, at)) is not None:
        if mark[0] == _FUNCTION_END:
            return arguments, mark.end(), True
        if not mark[0].startswith("<parameter"):
            return arguments, mark.start(), True
        name = mark[0][len("<parameter=") : -1].strip(" \t\"'")
        end, at = _value_end(text, mark.end())
        value = text[mark.end() : end].removeprefix("\n").removesuffix("\n")
        arguments[name] = typed(value, properties.get(name, {"type": "string"}))
    return arguments, len(text), False


def _value_end(text: str, start: int) -> tuple[int, int]:
    """Where the value that begins at `start` ends, and where to read on.

    Its closing tag may be missing: then the next tag that begins a line ends it, unless a closing tag follows before
    another parameter, which makes that line a part of the value.
    """
    closing = text.find(_PARAMETER_END, start)
    line = _NEXT_LINE.search(text, start)
    if closing >= 0:
        other = _PARAMETER.search(text, start)
        if line is None or line.start() > closing or (other is None or other.start() > closing):
            return closing, closing + len(_PARAMETER_END)
    if line is not None:
        return line.start(), line.end()
    inline = _NEXT.search(text, start)
    end = len(text) if inline is None else inline.start()
    return end, end


def typed(value: str, schema: Any) -> Any:
    """A value written as text, in the type that its JSON schema names; the text itself if it is not of that type."""
    if not isinstance(schema, Mapping):
        return value
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        for option in sorted(options, key=_is_text):
            found = typed(value, option)
            if not isinstance(found, str):
                return found
        return value
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    text = value.strip()
    if ("null" in kinds or schema.get("nullable")) and text in ("null", "None"):
        return None
    choices = schema.get("enum")
    if isinstance(choices, list) and value not in choices:
        return next((choice for choice in choices if text in (choice, str(choice), json.dumps(choice))), value)
    if "string" in kinds:
        return value
    literal = _literal(text)
    if not kinds and "enum" not in schema and literal is not _NOTHING:
        return literal
    if "boolean" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = isinstance(literal, int | float) and not isinstance(literal, bool) and abs(literal) < float("inf")
    if "integer" in kinds and number and literal == int(literal):
        return int(literal)
    if "number" in kinds and number:
        return literal
    if ("object" in kinds and isinstance(literal, dict)) or ("array" in kinds and isinstance(literal, list)):
        return literal
    return value


def _is_text(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "string"


_NOTHING = object()


def _literal(text: str) -> Any:
    """A JSON value, also if it is written as Python prints it."""
    try:
        return _encodable(_JSON.decode(text))
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in a model's text
            value = ast.literal_eval(text)
        return _encodable(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return _NOTHING


def _encodable(value: Any) -> Any:
    """A copy in JSON's own types, without the lone surrogates that its escapes can spell: they are no text.

    Raises ValueError or TypeError for what is no JSON value, and for one that is nested too deep to be meant.
    """
    if not _is_shallow(value, _MOST_LEVELS):
        raise ValueError(f"more than {_MOST_LEVELS} levels")
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _is_shallow(value: Any, levels: int) -> bool:
    """Whether there are no more levels than that of values within values."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)
