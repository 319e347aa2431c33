"""The tags in which Qwen3-Coder writes calls. They look like XML, but nothing in them is escaped:

<function=get_weather>
<parameter=city>
Paris
</parameter>
</function>
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from npqwen.tools.parameter_value import Schemas, parse_value

FUNCTION = re.compile(r"<function=([^<>\n]*)>")
FUNCTION_END = "</function>"
PARAMETER = re.compile(r"<parameter=([^<>\n]*)>")
PARAMETER_END = "</parameter>"
MARK = re.compile(r"<(?:parameter|function)=[^<>\n]*>|</function>")
"""A tag that may follow a value, or the function's opening tag."""
_NEXT_LINE = re.compile(r"\n[ \t]*(?=<parameter=[^<>\n]*>|</function>)")
_MAX_REFERENCES = 8
"""Longest chain of references that is followed; one may be a circle."""
_NEXT = re.compile(r"<parameter=[^<>\n]*>|</function>")


class TaggedCall(NamedTuple):
    """A call in a text. arguments: in order; a later one replaces an earlier one of the same name.

    start, end: the indices of its text. closed: whether it is complete even if the text was cut off: it has a closing
    tag, and so has each value (an unclosed one may contain the function's closing tag).
    """

    name: str
    arguments: list[tuple[str, Any]]
    start: int
    end: int
    closed: bool


def tagged_calls(text: str, schemas: Schemas) -> Iterator[TaggedCall]:
    """The calls in `text`, in order."""
    at = 0
    while (start := FUNCTION.search(text, at)) is not None:
        name = unquoted(start[1])
        arguments, at, closed = _parameters(text, start.end(), properties(schemas, name))
        yield TaggedCall(name, arguments, start.start(), at, closed)


def properties(schemas: Schemas, name: str) -> Mapping[str, Any]:
    """The schemas of a tool's parameters, by name; where one, or an option of one, is a reference, what it names."""
    root = schemas.get(name, {})
    found = root.get("properties")
    if not isinstance(found, Mapping):
        return {}
    resolved = {}
    for key, value in found.items():
        schema = _definition(value, root)
        for kind in ("anyOf", "oneOf"):
            if isinstance(schema, Mapping) and isinstance(schema.get(kind), list):
                schema = {**schema, kind: [_definition(option, root) for option in schema[kind]]}
        resolved[key] = schema
    return resolved


def _definition(schema: Any, root: Mapping[str, Any]) -> Any:
    """Resolve a schema's reference into `root`, such as "#/$defs/Unit"; keywords beside the reference override.

    Returns {} if `root` has no such part, and a schema without a reference unchanged.
    """
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            break
        rest, named = dict(schema), schema
        parts = schema.get("allOf")
        if isinstance(parts, list) and len(parts) == 1:  # a reference with a default, as older pydantic writes it
            del rest["allOf"]
            named = parts[0]
        elif isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/"):
            del rest["$ref"]
            named = root
            for key in reference[2:].split("/"):
                named = named.get(key, {}) if isinstance(named, Mapping) else {}
        else:
            break
        schema = {**named, **rest} if isinstance(named, Mapping) else rest
    return schema


def unquoted(name: str) -> str:
    """A name in a tag, without the spaces, tabs and quotes that models put around it."""
    return name.strip(" \t\"'")


def parameter_schema(properties: Mapping[str, Any], name: str) -> Any:
    """The schema of a parameter; values of an unknown one are text."""
    return properties.get(name, {"type": "string"})


def value_end(text: str, start: int) -> tuple[int, int]:
    """The end of the value that begins at `start`, and the index to continue at.

    If the closing tag is missing, the next tag at the start of a line ends the value. If a closing tag follows before
    the next parameter, such a line is part of the value. What follows the first closing tag makes no difference.
    """
    closing = text.find(PARAMETER_END, start)
    if closing >= 0:
        line = _NEXT_LINE.search(text, start, closing)
        if line is None or PARAMETER.search(text, start, closing) is None:
            return closing, closing + len(PARAMETER_END)
        return line.start(), line.end()
    line = _NEXT_LINE.search(text, start)
    if line is not None:
        return line.start(), line.end()
    inline = _NEXT.search(text, start)
    end = len(text) if inline is None else inline.start()
    return end, end


def _parameters(text: str, at: int, properties: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], int, bool]:
    """The arguments of the function whose tag ends at `at`, the index after it, and whether it is closed."""
    arguments: list[tuple[str, Any]] = []
    closed = True
    while (mark := MARK.search(text, at)) is not None:
        if mark[0] == FUNCTION_END:
            return arguments, mark.end(), closed
        if not mark[0].startswith("<parameter"):
            return arguments, mark.start(), closed
        name = unquoted(mark[0][len("<parameter=") : -1])
        end, at = value_end(text, mark.end())
        closed = closed and text.startswith(PARAMETER_END, end)
        value = text[mark.end() : end].removeprefix("\n").removesuffix("\n")
        arguments.append((name, parse_value(value, parameter_schema(properties, name))))
    return arguments, len(text), False
