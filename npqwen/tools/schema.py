"""A Python function's parameters as a JSON schema, from its signature and docstring.

Where Hugging Face transformers' `get_json_schema` accepts a function, the result is the same. What that refuses is
taken as far as it is known: a parameter without a type can be anything, one without a description has none.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from npqwen.errors import OptionError
from npqwen.tools.arguments import COLLECTIONS
from npqwen.tools.docstrings import read_docstring
from npqwen.tools.hints import (
    called_function,
    field_hints,
    is_named_tuple,
    parameters_of,
    type_hints,
    without_partial,
)

_SCALARS: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "description", "parameters"}}.

    Raises OptionError for what has no name or no signature.
    """
    name = function_name(function)
    hints = parameter_hints(function)
    called = called_function(function)
    documented = read_docstring(inspect.getdoc(called) or inspect.getdoc(without_partial(function)) or "")
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
    signature = parameters_of(function)
    if required := [key for key in hints if signature[key].default is inspect.Parameter.empty]:
        parameters["required"] = required
    result: dict[str, Any] = {"name": name}
    if documented.description:
        result["description"] = documented.description
    result["parameters"] = parameters
    returned = type_hints(called, notes=True).get("return")
    schema = {} if returned is None else hint_schema(returned)
    if schema or returned is Any:
        result["return"] = schema | ({"description": documented.returns} if documented.returns else {})
    return {"type": "function", "function": result}


def function_name(function: Callable[..., Any]) -> str:
    """Its name; that of its class for an object that can be called, of what it calls for a partial."""
    named = without_partial(function)
    name = getattr(named, "__name__", None) or type(named).__name__
    if not name.isidentifier():
        raise OptionError(f"the tool {name} has no name that a model could write; give it one by def")
    return str(name)


def parameter_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The type of each parameter that a call can name; Any where there is none."""
    try:
        parameters = parameters_of(function)
    except (TypeError, ValueError):
        raise OptionError(f"the tool {function!r} has no signature; wrap it in a function of your own") from None
    hints = type_hints(called_function(function), notes=True)
    named = [name for name, parameter in parameters.items() if parameter.kind not in _VARIADIC]
    if named[:1] in (["self"], ["cls"]) and named[0] not in hints:
        del named[0]
    return {name: hints.get(name, Any) for name in named}


def hint_schema(hint: Any, within: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The JSON schema of a type hint; {}, which anything satisfies, for one that JSON has nothing like.

    within: classes with fields that this is inside of; one that is inside itself is an object of no known fields.
    """
    origin, args = get_origin(hint), get_args(hint)
    if args == ((),):  # those of tuple[()] in Python 3.10
        args = ()
    kind = hint if origin is None else origin

    def inner(part: Any) -> dict[str, Any]:
        return hint_schema(part, (*within, kind))

    if origin is Annotated:
        notes = [note for note in args[1:] if isinstance(note, str)]
        return inner(args[0]) | ({"description": notes[0]} if notes else {})
    if origin in (Union, types.UnionType):
        return _union([inner(option) for option in args if option is not type(None)], type(None) in args)
    if origin is Literal:
        return _enum(list(args))
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if not isinstance(kind, type):
        return {}
    if is_typeddict(kind):
        if kind in within:
            return {"type": "object"}
        required = sorted(kind.__required_keys__)  # type: ignore[attr-defined]
        properties = {name: inner(field) for name, field in field_hints(kind).items()}
        return {"type": "object", "properties": properties} | ({"required": required} if required else {})
    if issubclass(kind, Enum):
        return _enum([member.value for member in kind])
    if is_named_tuple(kind):
        if kind in within:
            return {"type": "array"}
        return {"type": "array", "prefixItems": [inner(field) for field in field_hints(kind).values()]}
    if kind is tuple and args:
        if args[-1] is ...:
            return {"type": "array", "items": inner(args[0])}
        return {"type": "array", "prefixItems": [inner(item) for item in args]}
    if issubclass(kind, Mapping):
        return {"type": "object"} | ({"additionalProperties": inner(args[1])} if len(args) == 2 else {})
    if kind in COLLECTIONS:
        return {"type": "array"} | ({"items": inner(args[0])} if args else {})
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
