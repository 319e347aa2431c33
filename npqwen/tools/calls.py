"""Parsing of tool calls: JSON as Hermes and Qwen3 write them, or Qwen3-Coder's tags.

The format is recognised from the text. Mistakes of models whose meaning is clear are accepted: a missing closing tag or
brace, a number in quotes, an unescaped `&` (the tags are not XML). What cannot be read as a call is returned as text.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
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
_JSON = json.JSONDecoder(strict=False)  # models write unescaped newlines in strings
_MAX_DEPTH = 100
"""Nesting depth of arguments; code that reads them recurses."""


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
        marks = list(_PARAMETER.finditer(block))
        if not marks:
            return False
        last = marks[-1].end()
        return _PARAMETER_END not in block[last:] and _FUNCTION_END not in block[last:]
    return _scan(block)[1]


def _is_tagged(text: str) -> bool:
    return text[:1] not in ("{", "[") and _FUNCTION.search(text) is not None


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
        value, end = _JSON.raw_decode(text)
        return _json_copy(value), end
    except (ValueError, RecursionError):
        pass
    closers, in_string = _scan(text)
    if complete and closers and not in_string:
        try:
            return _json_copy(_JSON.decode(text + closers)), len(text)
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
            arguments = _json_copy(_JSON.decode(arguments.strip() or "{}"))
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
    while (start := _FUNCTION.search(text, at)) is not None:
        rest.append(text[at : start.start()].strip())
        name = start[1].strip(" \t\"'")
        properties = schemas.get(name, {}).get("properties")
        arguments, at, finished = _parameters(text, start.end(), properties if isinstance(properties, Mapping) else {})
        if not name or not (finished or complete):
            rest.append(text[start.start() : at].strip())
        else:
            calls.append(ToolCall(name, arguments))
    rest.append(text[at:].strip())
    return calls, "\n".join(part for part in rest if part)


def _parameters(text: str, at: int, properties: Mapping[str, Any]) -> tuple[dict[str, Any], int, bool]:
    """The arguments of the function whose tag ends at `at`, the index after it, and whether it was closed."""
    arguments: dict[str, Any] = {}
    while (mark := _MARK.search(text, at)) is not None:
        if mark[0] == _FUNCTION_END:
            return arguments, mark.end(), True
        if not mark[0].startswith("<parameter"):
            return arguments, mark.start(), True
        name = mark[0][len("<parameter=") : -1].strip(" \t\"'")
        end, at = _value_end(text, mark.end())
        value = text[mark.end() : end].removeprefix("\n").removesuffix("\n")
        arguments[name] = parse_value(value, properties.get(name, {"type": "string"}))
    return arguments, len(text), False


def _value_end(text: str, start: int) -> tuple[int, int]:
    """The end of the value that begins at `start`, and the index to continue at.

    If the closing tag is missing, the next tag at the start of a line ends the value. If a closing tag follows before
    the next parameter, such a line is part of the value.
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


def parse_value(value: str, schema: Any) -> Any:
    """The value that a text spells, of the type in its JSON schema; the text itself if it is not of that type."""
    if not isinstance(schema, Mapping):
        return value
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        for option in sorted(options, key=_is_text):
            parsed = parse_value(value, option)
            if not isinstance(parsed, str):
                return parsed
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
    """The value of a JSON or Python literal; _NOTHING if the text is neither."""
    try:
        return _json_copy(_JSON.decode(text))
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escape sequences
            value = ast.literal_eval(text)
        return _json_copy(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return _NOTHING


def _json_copy(value: Any) -> Any:
    """A copy made of JSON types, with lone surrogates, which JSON escapes can spell, replaced.

    Raises ValueError or TypeError for anything else, and for a value nested too deeply.
    """
    if not _is_shallow(value, _MAX_DEPTH):
        raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _is_shallow(value: Any, depth: int) -> bool:
    """Whether a value is nested at most `depth` levels deep."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return depth > 0 and all(_is_shallow(part, depth - 1) for part in parts)
