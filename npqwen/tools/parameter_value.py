"""Values of arguments that a model writes as plain text, and the types that a tool's schema gives them."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from typing import Any

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's parameters, by the tool's name."""

JSON = json.JSONDecoder(strict=False)  # models write unescaped newlines in strings
_MAX_DEPTH = 100
"""Deepest nesting of arguments; the code that reads them is recursive."""
_NULL = ("null", "None")


def parse_value(value: str, schema: Any) -> Any:
    """A text parsed as a value of the type in its JSON schema; the text itself if it does not have that type."""
    if not isinstance(schema, Mapping):
        return value
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        for option in sorted(options, key=_is_string):
            parsed = parse_value(value, option)
            if not isinstance(parsed, str):
                return parsed
        return value
    kinds = _kinds(schema)
    text = value.strip()
    if _is_nullable(schema, kinds) and text in _NULL:
        return None
    choices = _choices(schema)
    if choices is not None and value not in choices:
        return next((choice for choice in choices if text in (choice, str(choice), json.dumps(choice))), value)
    if "string" in kinds:
        return value
    literal = _literal(text)
    if not kinds and choices is None and literal is not _NOTHING:
        return literal
    if "boolean" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = isinstance(literal, int | float) and not isinstance(literal, bool)
    if "integer" in kinds and number and literal == int(literal):
        return int(literal)
    if "number" in kinds and number:
        return literal
    if ("object" in kinds and isinstance(literal, dict)) or ("array" in kinds and isinstance(literal, list)):
        return literal
    return value


def stays_text(begun: str, schema: Any) -> bool:
    """Whether `parse_value` returns every value that begins with `begun` unchanged."""
    if not isinstance(schema, Mapping):
        return True
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        return all(stays_text(begun, option) for option in options)
    kinds = _kinds(schema)
    if _is_nullable(schema, kinds) and any(word.startswith(begun.strip()) for word in _NULL):
        return False
    return ("string" in kinds or kinds == ["null"]) and _choices(schema) is None


def json_copy(value: Any) -> Any:
    """A copy made of JSON types, with lone surrogates, which JSON escapes can produce, replaced.

    Raises ValueError or TypeError for anything else, also for NaN and infinity, and for a value nested too deeply.
    """
    if not _is_shallow(value, _MAX_DEPTH):
        raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
    return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))


def _kinds(schema: Mapping[str, Any]) -> list[Any]:
    kinds = schema.get("type")
    return [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []


def _choices(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema allows, if it lists them."""
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return choices if isinstance(choices, list) else None


def _is_nullable(schema: Mapping[str, Any], kinds: list[Any]) -> bool:
    return "null" in kinds or bool(schema.get("nullable"))


def _is_string(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "string"


_NOTHING = object()


def _literal(text: str) -> Any:
    """The value of a JSON or Python literal; _NOTHING if the text is neither."""
    try:
        return json_copy(JSON.decode(text))
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escape sequences
            value = ast.literal_eval(text)
        return json_copy(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return _NOTHING


def _is_shallow(value: Any, depth: int) -> bool:
    """Whether a value is nested at most `depth` levels deep."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return depth > 0 and all(_is_shallow(part, depth - 1) for part in parts)
