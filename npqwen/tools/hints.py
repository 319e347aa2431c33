"""The signature and the type hints of what is called, with names that cannot be resolved left out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

if sys.version_info >= (3, 14):
    import annotationlib


def without_partial(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a `functools.partial` calls in the end; anything else as it is."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def called_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or class, that a call comes to: a partial's, or an object's `__call__`."""
    function = without_partial(function)
    if inspect.isroutine(function) or inspect.isclass(function):
        return function
    return type(function).__call__


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Its parameters by name. Raises TypeError or ValueError if it has no signature."""
    if sys.version_info >= (3, 14):  # annotations are evaluated only there, and may name what is not there
        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF).parameters
    return inspect.signature(function).parameters


def type_hints(described: Callable[..., Any], *, notes: bool = False) -> dict[str, Any]:
    """The hints of a function's parameters and its "return", or of a class's fields, as far as they can be resolved.

    notes: leave `Annotated` as it is.
    """
    try:
        return typing.get_type_hints(described, include_extras=notes)
    except Exception:  # a name that is not there, or anything else that an annotation may raise: then one by one
        pass
    module = sys.modules.get(getattr(described, "__module__", ""))
    names = getattr(inspect.unwrap(described), "__globals__", vars(module) if module else {})
    found: dict[str, Any] = {}
    for name, hint in _annotations(described).items():

        def alone() -> None: ...

        alone.__annotations__ = {name: hint}
        with contextlib.suppress(Exception):
            found |= typing.get_type_hints(alone, names, include_extras=notes)
    return found


def is_named_tuple(kind: type) -> bool:
    """Whether it is a class made by `NamedTuple` or `namedtuple`."""
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def field_hints(kind: type) -> dict[str, Any]:
    """The hint of each field of a TypedDict or a named tuple; Any where it is not known."""
    hints = type_hints(kind)
    return {name: hints.get(name, Any) for name in getattr(kind, "_fields", None) or _annotations(kind)}


def _annotations(described: Callable[..., Any]) -> Mapping[str, Any]:
    if sys.version_info >= (3, 14):
        return annotationlib.get_annotations(described, format=annotationlib.Format.FORWARDREF)
    return inspect.get_annotations(described)
