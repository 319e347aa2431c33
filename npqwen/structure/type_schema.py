"""JSON schemas of Python types: dataclasses, TypedDicts, pydantic models, and the hints of their fields."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections import abc, deque
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from npqwen.errors import OptionError
from npqwen.structure.hints import field_hints, is_named_tuple, type_hints
from npqwen.structure.subschemas import mapped
from npqwen.wording import quoted

SCALARS: Mapping[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
"""Types that are neither arrays nor objects in JSON, and their names there."""
ARRAYS: Mapping[Any, type[Any]] = {
    **{kind: kind for kind in (list, tuple, set, frozenset, deque)},
    **dict.fromkeys(
        (abc.Iterable, abc.Container, abc.Collection, abc.Reversible, abc.Sequence, abc.MutableSequence), list
    ),
    **dict.fromkeys((abc.Set, abc.MutableSet), set),
}
"""Types that are arrays in JSON, and the type that an array becomes for each."""
_ANY: tuple[Any, ...] = (Any, object)


def type_schema(kind: Any) -> dict[str, Any]:
    """The JSON schema of a type's values, with classes that have fields in `$defs`.

    Properties are in the order of the fields; those with a default may be left out, and there are no others. Raises
    OptionError for a type that has no JSON counterpart.
    """
    if is_pydantic(kind):
        return pydantic_schema(kind)
    definitions = _Definitions()
    schema = definitions.schema(kind, _name(kind))
    return schema | ({"$defs": definitions.schemas} if definitions.schemas else {})


def is_pydantic(kind: Any) -> bool:
    """Whether this is a class of pydantic's: a model, or a pydantic dataclass."""
    return inspect.isclass(kind) and get_origin(kind) is None and hasattr(kind, "__pydantic_validator__")


def pydantic_schema(kind: Any) -> dict[str, Any]:
    """The schema that pydantic generates for its class; OptionError if it cannot."""
    from pydantic import TypeAdapter

    try:
        return dict(mapped(TypeAdapter(kind).json_schema(), _of_json))
    except Exception as error:  # a model's own code can raise anything
        raise OptionError(f"schema: {kind.__name__} has no JSON schema: {quoted(str(error))}") from None


_NOT_OF_JSON = {"binary", "password", "path", "file-path", "directory-path", "base64url", "json-string"}
"""Formats of pydantic's own."""


def _of_json(schema: dict[str, Any]) -> dict[str, Any]:
    """Without what only pydantic can check: that a set's items are unique, and formats of its own."""
    return {
        key: value
        for key, value in schema.items()
        if not (key == "uniqueItems" and value is True) and not (key == "format" and value in _NOT_OF_JSON)
    }


def check_literal(kind: Any, values: list[Any], where: str) -> dict[str, Any]:
    """The schema of a value that must be one of a few strings, numbers, booleans and None."""
    for value in values:
        if type(value) not in SCALARS:
            raise OptionError(f"schema: {where} is {quoted(kind)}, with {quoted(value)}, which JSON does not have")
    return {"enum": values}


class _Definitions:
    """The `$defs` of one schema: a class with fields is described once, even if it contains itself."""

    def __init__(self) -> None:
        self.schemas: dict[str, Any] = {}
        self._names: dict[Any, str] = {}

    def schema(self, hint: Any, where: str) -> dict[str, Any]:
        """The schema of a hint. where: names it in messages."""
        origin, args = get_origin(hint), get_args(hint)
        if args == ((),):  # of tuple[()] in Python 3.10
            args = ()
        kind = hint if origin is None else origin
        if hint in _ANY:
            return {}
        if hasattr(kind, "__supertype__"):  # a NewType
            return self.schema(kind.__supertype__, where)
        if origin is Annotated:
            notes = [note for note in args[1:] if isinstance(note, str)]
            return self.schema(args[0], where) | ({"description": notes[0]} if notes else {})
        if origin in (Union, types.UnionType):
            return {"anyOf": [self.schema(option, where) for option in args]}
        if origin is Literal:
            values = [value.value if isinstance(value, Enum) else value for value in args]
            return check_literal(hint, values, where)
        if hint is None or kind in SCALARS:
            return {"type": SCALARS[type(None) if hint is None else kind]}
        if inspect.isclass(kind):
            if is_pydantic(kind) or is_typeddict(kind) or dataclasses.is_dataclass(kind):
                if not args:
                    return self._reference(kind)
            elif issubclass(kind, Enum):
                return check_literal(kind, [member.value for member in kind], where)
            elif is_named_tuple(kind):
                return self._tuple([self.schema(h, f"{where}.{n}") for n, h in field_hints(kind).items()])
            elif kind is tuple and args and args[-1] is not ...:
                return self._tuple([self.schema(item, where) for item in args])
            elif kind in (dict, abc.Mapping, abc.MutableMapping):
                if not args or args[0] in (str, *_ANY):
                    return {"type": "object"} | ({"additionalProperties": self.schema(args[1], where)} if args else {})
            elif kind in ARRAYS:
                return {"type": "array"} | ({"items": self.schema(args[0], where)} if args else {})
        raise OptionError(f"schema: {where} is {quoted(hint)}, which has no JSON schema; use a pydantic model for it")

    def _tuple(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}

    def _reference(self, kind: Any) -> dict[str, Any]:
        if kind not in self._names:
            name, number = kind.__name__, 1
            while name in self.schemas:
                number += 1
                name = f"{kind.__name__}_{number}"
            self._names[kind] = name
            self.schemas[name] = {}
            self.schemas[name] = self._pydantic(kind) if is_pydantic(kind) else self._fields(kind)
        return {"$ref": f"#/$defs/{self._names[kind]}"}

    def _pydantic(self, kind: Any) -> dict[str, Any]:
        schema = pydantic_schema(kind)
        for name, definition in schema.pop("$defs", {}).items():
            if self.schemas.setdefault(name, definition) != definition:
                raise OptionError(f"schema: two classes are named {name}; rename one")
        return schema

    def _fields(self, kind: Any) -> dict[str, Any]:
        found = fields(kind)
        properties = {name: self.schema(hint, f"{kind.__name__}.{name}") for name, (hint, _) in found.items()}
        required = [name for name, (_, needed) in found.items() if needed]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The hint of each field of a dataclass or TypedDict, and whether it must be given.

    Raises OptionError for a hint that cannot be resolved.
    """
    hints = type_hints(kind, notes=True)
    if dataclasses.is_dataclass(kind):
        needed = {
            field.name: field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            for field in dataclasses.fields(kind)
            if field.init
        }
    else:
        needed = {name: name in kind.__required_keys__ for name in field_hints(kind)}
        for name, hint in hints.items():
            mark = str(get_origin(hint)).rpartition(".")[2]  # of typing or typing_extensions
            if mark in ("Required", "NotRequired"):  # __required_keys__ is wrong where annotations are strings
                hints[name], needed[name] = get_args(hint)[0], mark == "Required"
    unknown = next((name for name in needed if name not in hints), None)
    if unknown is not None:
        raise OptionError(f"schema: the type of {kind.__name__}.{unknown} cannot be resolved; define it in its module")
    return {name: (hints[name], required) for name, required in needed.items()}


def _name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind))
