"""JSON schemas of Python functions, from signature and docstring.

For a function that `get_json_schema` of Hugging Face transformers accepts, the schema is identical. Functions that it
refuses are accepted, too: a parameter without a hint may be anything, one without a description gets none.
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
from npqwen.structure.hints import (
    called_function,
    field_hints,
    is_named_tuple,
    parameters_of,
    type_hints,
    without_partial,
)
from npqwen.structure.type_schema import ARRAYS, SCALARS
from npqwen.tools.docstrings import read_docstring
from npqwen.wording import quoted

_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema {"type": "function", "function": {"name", "description", "parameters"}}.

    Raises OptionError for a callable without a usable name or without a signature.
    """
    name = function_name(function)
    hints = parameter_hints(function)
    called = called_function(function)
    documented = read_docstring(inspect.getdoc(called) or inspect.getdoc(without_partial(function)) or "")
    properties: dict[str, Any] = {}
    for parameter, hint in hints.items():
        schema = hint_schema(hint)
        description = documented.parameters.get(parameter, "")
        if choices := _CHOICES.search(description):
            try:
                values = json.loads(choices[1])
            except ValueError:
                values = None
            if isinstance(values, list):
                schema["enum"] = [value.strip() if isinstance(value, str) else value for value in values]
                description = description[: choices.start()].strip()
        if description:
            schema["description"] = description
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
    """A callable's name: that of the function inside a partial, of the class for an object with `__call__`.

    Raises OptionError if it is not an identifier.
    """
    named = without_partial(function)
    name = getattr(named, "__name__", None) or type(named).__name__
    if not name.isidentifier():
        raise OptionError(f"a tool cannot be named {name}; define it with def and a name of its own")
    return str(name)


def parameter_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The type of each parameter that a call can pass by name or position; Any for one without a hint."""
    try:
        parameters = parameters_of(function)
    except (TypeError, ValueError):
        raise OptionError(f"the tool {quoted(function)} has no signature; wrap it in a function that has one") from None
    hints = type_hints(called_function(function), notes=True)
    named = [name for name, parameter in parameters.items() if parameter.kind not in _VARIADIC]
    if named[:1] in (["self"], ["cls"]) and named[0] not in hints:
        del named[0]
    return {name: hints.get(name, Any) for name in named}


def hint_schema(hint: Any, within: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The JSON schema of a type hint; {}, which accepts anything, for a hint that has no JSON counterpart.

    within: the types that enclose this hint; a class with fields inside itself is not expanded again.
    """
    origin, args = get_origin(hint), get_args(hint)
    if args == ((),):  # of tuple[()] in Python 3.10
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
    if kind in SCALARS:
        return {"type": SCALARS[kind]}
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
    if kind in ARRAYS:
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
    if not values or any(type(value) not in SCALARS for value in values):
        return {}
    names = list(dict.fromkeys(SCALARS[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
