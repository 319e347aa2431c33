"""A Python function's parameters as a JSON schema, from its signature and docstring.

Where Hugging Face transformers' `get_json_schema` accepts a function, the result is the same. What that refuses is
taken as far as it is known: a parameter without a type can be anything, one without a description has none.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from npqwen.chat.docstrings import read_docstring
from npqwen.errors import OptionError

_SCALARS: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "description", "parameters"}}.

    Raises OptionError for what has no name or no signature.
    """
    name = function_name(function)
    hints = parameter_hints(function)
    documented = read_docstring(function)
    properties: dict[str, Any] = {}
    for parameter, hint in hints.items():
        schema = hint_schema(hint)
        described = documented.parameters.get(parameter, "")
        if choices := _CHOICES.search(described):
            try:
                values = json.loads(choices[1])
            except ValueError:
                values = None
            if isinstance(values, list):
                schema["enum"] = [value.strip() if isinstance(value, str) else value for value in values]
                described = described[: choices.start()].strip()
        if described:
            schema["description"] = described
        properties[parameter] = schema
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    signature = inspect.signature(function).parameters
    if required := [key for key in hints if signature[key].default is inspect.Parameter.empty]:
        parameters["required"] = required
    result: dict[str, Any] = {"name": name}
    if documented.description:
        result["description"] = documented.description
    result["parameters"] = parameters
    returned = _hints(function).get("return", Any)
    schema = hint_schema(returned)
    if schema or (returned is Any and "return" in _hints(function)):
        result["return"] = schema | ({"description": documented.returns} if documented.returns else {})
    return {"type": "function", "function": result}


def function_name(function: Callable[..., Any]) -> str:
    """Its name; that of its class for an object that can be called, of what it calls for a partial."""
    inner = getattr(function, "func", function)
    name = getattr(inner, "__name__", None) or type(inner).__name__
    if not name.isidentifier():
        raise OptionError(f"the tool {name} has no name that a model could write; give it one by def")
    return str(name)


def parameter_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The type of each parameter that a call can name; Any where there is none."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise OptionError(f"the tool {function!r} has no signature; wrap it in a function of your own") from None
    hints = _hints(function)
    named = [name for name, parameter in parameters.items() if parameter.kind not in _VARIADIC]
    if named[:1] in (["self"], ["cls"]) and named[0] not in hints:
        del named[0]
    return {name: hints.get(name, Any) for name in named}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    function = getattr(function, "func", function)
    if not inspect.isroutine(function):
        function = type(function).__call__
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # a name that is not there, or anything else that an annotation may raise: then one by one
        return _each_hint(function)


def _each_hint(function: Callable[..., Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in getattr(function, "__annotations__", {}).items():

        def alone() -> None: ...

        alone.__annotations__ = {name: hint}
        with contextlib.suppress(Exception):
            found |= typing.get_type_hints(alone, getattr(function, "__globals__", {}), include_extras=True)
    return found


def hint_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint; {}, which anything satisfies, for one that JSON has nothing like."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        notes = [note for note in args[1:] if isinstance(note, str)]
        return hint_schema(args[0]) | ({"description": notes[0]} if notes else {})
    if origin in (Union, types.UnionType):
        return _union([hint_schema(option) for option in args if option is not type(None)], type(None) in args)
    if origin is Literal:
        return _enum(list(args))
    kind = hint if origin is None else origin
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if not isinstance(kind, type):
        return {}
    if is_typeddict(kind):
        fields = typing.get_type_hints(kind)
        required = sorted(kind.__required_keys__)  # type: ignore[attr-defined]
        return {"type": "object", "properties": {name: hint_schema(field) for name, field in fields.items()}} | (
            {"required": required} if required else {}
        )
    if issubclass(kind, Enum):
        return _enum([member.value for member in kind])
    if issubclass(kind, tuple):
        if not args or hint == tuple[()]:
            return {"type": "array"}
        if args[-1] is ...:
            return {"type": "array", "items": hint_schema(args[0])}
        return {"type": "array", "prefixItems": [hint_schema(item) for item in args]}
    if issubclass(kind, Mapping):
        return {"type": "object"} | ({"additionalProperties": hint_schema(args[1])} if len(args) == 2 else {})
    if issubclass(kind, Iterable) and not issubclass(kind, bytes | bytearray):
        return {"type": "array"} | ({"items": hint_schema(args[0])} if args else {})
    return {}


def _union(options: list[dict[str, Any]], nullable: bool) -> dict[str, Any]:
    if len(options) == 1:
        schema = options[0]
    elif all(option.keys() == {"type"} and isinstance(option["type"], str) for option in options):
        names = sorted({option["type"] for option in options})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": options}
    return schema | ({"nullable": True} if nullable else {})


def _enum(values: list[Any]) -> dict[str, Any]:
    values = [value.value if isinstance(value, Enum) else value for value in values]
    if not values or any(type(value) not in _SCALARS for value in values):
        return {}
    names = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
