"""The schemas within a JSON schema: where keywords have them, and not where a property has a keyword's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_SINGLE = (
    *("items", "additionalItems", "unevaluatedItems", "contains"),
    *("additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("not", "if", "then", "else"),
)
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
TABLES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose keys are names."""


def mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy of a schema in which `change` has replaced every schema, the innermost first.

    change: takes a copy, which it may modify. True and False, which are schemas too, stay as they are.
    """
    if not isinstance(schema, Mapping):
        return schema
    copy = dict(schema)
    for key, value in schema.items():
        if key in _SINGLE and isinstance(value, Mapping):
            copy[key] = mapped(value, change)
        elif key in _LISTS and isinstance(value, list):
            copy[key] = [mapped(one, change) for one in value]
        elif key in TABLES and isinstance(value, Mapping):
            copy[key] = {name: mapped(one, change) for name, one in value.items()}
    return change(copy)
