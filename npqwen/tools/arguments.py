"""The arguments of a model's call, made to fit a function's type hints, or refused in words that the model can use."""

from __future__ import annotations

import contextlib
import json
import math
import types
from collections import abc, deque
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from npqwen.tools.hints import field_hints, is_named_tuple

COLLECTIONS: Mapping[Any, type[Collection[Any]]] = {
    **{kind: kind for kind in (list, tuple, set, frozenset, deque)},
    **dict.fromkeys(
        (abc.Iterable, abc.Container, abc.Collection, abc.Reversible, abc.Sequence, abc.MutableSequence), list
    ),
    **dict.fromkeys((abc.Set, abc.MutableSet), set),
}
"""What a hint's kind of collection is made as. Other classes that can be iterated may mean anything by it."""


class ArgumentError(ValueError):
    """An argument that does not fit; the message is for the model."""


def fitted(value: Any, hint: Any, where: str) -> Any:
    """A JSON value as the type that a hint names.

    What models mix up is put right: numbers and JSON in strings, 3.0 for 3, a number for a string. Enum members are
    found by value or name; lists become the hint's kind of collection. A hint that JSON has nothing like takes
    anything. Raises ArgumentError.
    """
    origin, args = get_origin(hint), get_args(hint)
    if args == ((),):  # those of tuple[()] in Python 3.10
        args = ()
    if origin is Annotated:
        return fitted(value, args[0], where)
    if origin in (Union, types.UnionType):
        return _option(value, args, where)
    if origin is Literal:
        return _choice(value, {(a.value if isinstance(a, Enum) else a): a for a in args}, where)
    kind = hint if origin is None else origin
    if kind is type(None):
        return _checked(None, value in (None, "null", "None"), value, "null", where)
    if not isinstance(kind, type) or kind is object:
        return value
    if kind in _SCALARS:
        return _SCALARS[kind](value, where)
    if issubclass(kind, Enum):
        members: dict[Any, Any] = {member.name: member for member in kind}
        return _choice(value, {member.value: member for member in kind}, where, members)
    if is_typeddict(kind):
        return _fields(_parsed(value, dict, where), kind, where)
    if issubclass(kind, Mapping):
        key, item = args if len(args) == 2 else (Any, Any)
        found = _parsed(value, dict, where)
        return {fitted(k, key, f"a key of {where}"): fitted(v, item, f"{where}[{k!r}]") for k, v in found.items()}
    if is_named_tuple(kind):
        return kind(*_each(_parsed(value, list, where), list(field_hints(kind).values()), where))
    if kind is tuple and args and args[-1] is not ...:
        return tuple(_each(_parsed(value, list, where), list(args), where))
    if kind in COLLECTIONS:
        return _items(_parsed(value, list, where), COLLECTIONS[kind], args, where)
    return value


def _option(value: Any, options: tuple[Any, ...], where: str) -> Any:
    """The first option that takes the value as it is, else the first that can be made of it."""
    exact = [option for option in options if _is_exactly(value, option)]
    for option in [*exact, *sorted(options, key=lambda option: option is str)]:
        try:
            return fitted(value, option, where)
        except ArgumentError:
            continue
    raise ArgumentError(f"{where} is {_shown(value)}, which fits none of {', '.join(map(_name, options))}")


def _is_exactly(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    return type(value) is kind or (kind is Literal and value in get_args(hint))


def _choice(value: Any, choices: dict[Any, Any], where: str, names: Mapping[Any, Any] | None = None) -> Any:
    for choice, meant in choices.items():
        if choice == value and type(choice) is type(value):
            return meant
    for known in (choices, names or {}):
        for choice, meant in known.items():
            if isinstance(value, str | int | float) and str(choice) == str(value):
                return meant
    raise ArgumentError(f"{where} is {_shown(value)}; it must be one of {', '.join(map(_shown, choices))}")


def _boolean(value: Any, where: str) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return bool(_checked(value, isinstance(value, bool), value, "true or false", where))


def _integer(value: Any, where: str) -> int:
    number = _number_in(value)
    whole = number is not None and math.isfinite(number) and number == int(number)
    return int(_checked(number, whole, value, "a whole number", where))


def _number(value: Any, where: str) -> float:
    number = _number_in(value)
    return float(_checked(number, number is not None and abs(number) < 1e308, value, "a number", where))


def _number_in(value: Any) -> int | float | None:
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
    return str(_checked(value, isinstance(value, str), value, "a string", where))


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {bool: _boolean, int: _integer, float: _number, str: _string}


def _parsed(value: Any, kind: type[list[Any]] | type[dict[Any, Any]], where: str) -> Any:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value, strict=False)
    return _checked(value, isinstance(value, kind), value, "an array" if kind is list else "an object", where)


def _each(values: list[Any], hints: list[Any], where: str) -> list[Any]:
    if len(values) != len(hints):
        raise ArgumentError(f"{where} has {len(values)} items; it must have {len(hints)}")
    return [fitted(v, hint, f"{where}[{i}]") for i, (v, hint) in enumerate(zip(values, hints, strict=True))]


def _items(values: list[Any], kind: Callable[[list[Any]], Any], args: tuple[Any, ...], where: str) -> Any:
    found = [fitted(value, args[0], f"{where}[{i}]") for i, value in enumerate(values)] if args else values
    try:
        return kind(found)
    except TypeError:
        raise ArgumentError(f"{where} has an item that cannot be in a set") from None


def _fields(value: dict[str, Any], kind: Any, where: str) -> dict[str, Any]:
    hints = field_hints(kind)
    for key in sorted(kind.__required_keys__ - value.keys()):
        raise ArgumentError(f"{where} has no {key!r}")
    return {key: fitted(item, hints.get(key, Any), f"{where}[{key!r}]") for key, item in value.items()}


def _checked(result: Any, fits: bool, value: Any, wanted: str, where: str) -> Any:
    if not fits:
        raise ArgumentError(f"{where} is {_shown(value)}; it must be {wanted}")
    return result


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
