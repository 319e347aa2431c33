"""Conversion of JSON values to instances of the types that `npqwen.structure.type_schema` describes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
from collections import abc
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from npqwen.structure.hints import field_hints, is_named_tuple
from npqwen.structure.type_schema import ARRAYS, SCALARS, fields, is_pydantic
from npqwen.wording import shortened


class Mismatch(ValueError):
    """A value that is not of the type."""


def instance(kind: Any, value: Any) -> Any:
    """The instance of a type that a JSON value encodes, including nested ones.

    Raises Mismatch for a value that does not follow the type's schema, and what a class's own checks raise.
    """
    origin, args = get_origin(kind), get_args(kind)
    if args == ((),):  # of tuple[()] in Python 3.10
        args = ()
    if hasattr(kind, "__supertype__"):
        return instance(kind.__supertype__, value)
    if origin is Annotated:
        return instance(args[0], value)
    if origin in (Union, types.UnionType):
        return _first_that_fits(args, value)
    if origin is Literal:
        return _choice({(arg.value if isinstance(arg, Enum) else arg): arg for arg in args}, value)
    kind = kind if origin is None else origin
    if kind is None or kind in SCALARS:
        return _scalar(type(None) if kind is None else kind, value)
    if not inspect.isclass(kind) or kind is object:
        return value
    if is_pydantic(kind):
        from pydantic import TypeAdapter

        return TypeAdapter(kind).validate_json(json.dumps(value))
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        hints = fields(kind)
        given = _of(dict, value)
        if given.keys() - hints.keys() or any(needed and name not in given for name, (_, needed) in hints.items()):
            raise Mismatch(f"the fields of {kind.__name__} are {', '.join(hints)}")
        return kind(**{name: instance(hints[name][0], item) for name, item in given.items()})
    if issubclass(kind, Enum):
        return _choice({member.value: member for member in kind}, value)
    if is_named_tuple(kind):
        return kind(*_items(list(field_hints(kind).values()), value))
    if kind is tuple and args and args[-1] is not ...:
        return tuple(_items(list(args), value))
    if kind in ARRAYS:
        items = [instance(args[0], item) for item in _of(list, value)] if args else _of(list, value)
        return ARRAYS[kind](items)
    if kind in (dict, abc.Mapping, abc.MutableMapping):
        return {key: instance(args[1] if args else Any, item) for key, item in _of(dict, value).items()}
    return value


def _first_that_fits(options: tuple[Any, ...], value: Any) -> Any:
    failure: Exception = Mismatch("no type is allowed")
    for option in options:
        try:
            return instance(option, value)
        except ValueError as error:  # pydantic's ValidationError, too
            failure = error
    raise failure


def _choice(choices: dict[Any, Any], value: Any) -> Any:
    for choice, result in choices.items():
        if choice == value and type(choice) is type(value):
            return result
    raise Mismatch(f"{value!r} is none of {', '.join(map(repr, choices))}")


def _scalar(kind: type[Any], value: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise Mismatch(f"{shortened(str(value))} is too large for a float") from None
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return _of(kind, value)


def _items(hints: list[Any], value: Any) -> list[Any]:
    values = _of(list, value)
    if len(values) != len(hints):
        raise Mismatch(f"there are {len(values)} items; there must be {len(hints)}")
    return [instance(hint, item) for hint, item in zip(hints, values, strict=True)]


def _of(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise Mismatch(f"{value!r} is not of the type {kind.__name__}")
    return value
