"""Coercion of the arguments of a model's call to a function's type hints.

An argument that does not fit raises an error worded for the model, which can then correct its call.
"""

from __future__ import annotations

import contextlib
import json
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from npqwen.structure.hints import field_hints, is_named_tuple
from npqwen.structure.type_schema import ARRAYS


class ArgumentError(ValueError):
    """An argument that does not fit its hint; the message is for the model."""


def coerce(value: Any, hint: Any, where: str) -> Any:
    """A JSON value converted to the type that `hint` names.

    Common mistakes of models are corrected: numbers and JSON inside strings, 3.0 for an int, a number for a string.
    Enum members are looked up by value, then by name. Arrays become the hint's collection type. A hint that has no
    JSON counterpart accepts any value. where: names the argument in messages. Raises ArgumentError.
    """
    origin, args = get_origin(hint), get_args(hint)
    if args == ((),):  # of tuple[()] in Python 3.10
        args = ()
    if origin is Annotated:
        return coerce(value, args[0], where)
    if origin in (Union, types.UnionType):
        return _union(value, args, where)
    if origin is Literal:
        return _choice(value, {(a.value if isinstance(a, Enum) else a): a for a in args}, where)
    kind = hint if origin is None else origin
    if kind is type(None):
        return _require(value in (None, "null", "None"), None, value, "null", where)
    if not isinstance(kind, type) or kind is object:
        return value
    if kind in _SCALARS:
        return _SCALARS[kind](value, where)
    if issubclass(kind, Enum):
        members: dict[Any, Any] = {member.name: member for member in kind}
        return _choice(value, {member.value: member for member in kind}, where, members)
    if is_typeddict(kind):
        return _typed_dict(_decoded(value, dict, where), kind, where)
    if issubclass(kind, Mapping):
        key, item = args if len(args) == 2 else (Any, Any)
        entries = _decoded(value, dict, where)
        return {coerce(k, key, f"a key of {where}"): coerce(v, item, f"{where}[{k!r}]") for k, v in entries.items()}
    if is_named_tuple(kind):
        return kind(*_fixed_items(_decoded(value, list, where), list(field_hints(kind).values()), where))
    if kind is tuple and args and args[-1] is not ...:
        return tuple(_fixed_items(_decoded(value, list, where), list(args), where))
    if kind in ARRAYS:
        return _collection(_decoded(value, list, where), ARRAYS[kind], args, where)
    return value


def _union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    """The value coerced to the first option of exactly its type, else to the first one that accepts it, str last."""
    exact = [option for option in options if _is_exactly(value, option)]
    for option in [*exact, *sorted(options, key=lambda option: option is str)]:
        try:
            return coerce(value, option, where)
        except ArgumentError:
            continue
    raise ArgumentError(f"{where} is {_quoted(value)}, which fits none of {', '.join(map(_name, options))}")


def _is_exactly(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    return type(value) is kind or (kind is Literal and value in get_args(hint))


def _choice(value: Any, choices: dict[Any, Any], where: str, by_name: Mapping[Any, Any] | None = None) -> Any:
    for choice, result in choices.items():
        if choice == value and type(choice) is type(value):
            return result
    for table in (choices, by_name or {}):
        for choice, result in table.items():
            if isinstance(value, str | int | float) and str(choice) == str(value):
                return result
    raise ArgumentError(f"{where} is {_quoted(value)}; it must be one of {', '.join(map(_quoted, choices))}")


def _boolean(value: Any, where: str) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return bool(_require(isinstance(value, bool), value, value, "true or false", where))


def _integer(value: Any, where: str) -> int:
    number = _parse_number(value)
    whole = isinstance(number, int) or (number is not None and number.is_integer())
    return int(_require(whole, number, value, "a whole number", where))


def _number(value: Any, where: str) -> float:
    number = _parse_number(value)
    return float(_require(number is not None and abs(number) < 1e308, number, value, "a number", where))


def _parse_number(value: Any) -> int | float | None:
    """The number that `value` is or, as a string, spells; None if there is none."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _string(value: Any, where: str) -> str:
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return str(_require(isinstance(value, str), value, value, "a string", where))


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {bool: _boolean, int: _integer, float: _number, str: _string}


def _decoded(value: Any, kind: type[list[Any]] | type[dict[Any, Any]], where: str) -> Any:
    """A list or dict, decoded from JSON if it was given as a string."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value, strict=False)
    return _require(isinstance(value, kind), value, value, "an array" if kind is list else "an object", where)


def _fixed_items(values: list[Any], hints: list[Any], where: str) -> list[Any]:
    """Items of a tuple, each with a hint of its own."""
    if len(values) != len(hints):
        raise ArgumentError(f"{where} has {len(values)} items; it must have {len(hints)}")
    return [coerce(v, hint, f"{where}[{i}]") for i, (v, hint) in enumerate(zip(values, hints, strict=True))]


def _collection(values: list[Any], kind: Callable[[list[Any]], Any], args: tuple[Any, ...], where: str) -> Any:
    items = [coerce(value, args[0], f"{where}[{i}]") for i, value in enumerate(values)] if args else values
    try:
        return kind(items)
    except TypeError:
        raise ArgumentError(f"{where} has an item that cannot be in a set") from None


def _typed_dict(value: dict[str, Any], kind: Any, where: str) -> dict[str, Any]:
    hints = field_hints(kind)
    for key in sorted(kind.__required_keys__ - value.keys()):
        raise ArgumentError(f"{where} has no {key!r}")
    return {key: coerce(item, hints.get(key, Any), f"{where}[{key!r}]") for key, item in value.items()}


def _require(fits: bool, result: Any, value: Any, expected: str, where: str) -> Any:
    """`result` if it fits; otherwise ArgumentError about `value`, which it was made from."""
    if not fits:
        raise ArgumentError(f"{where} is {_quoted(value)}; it must be {expected}")
    return result


def _quoted(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
