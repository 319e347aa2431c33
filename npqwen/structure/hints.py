"""Signatures and type hints of callables. Hints that cannot be resolved are left out."""

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
    """The callable inside a `functools.partial`, however many levels deep; any other callable itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def called_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function or class behind a callable: a partial's function, an object's `__call__`."""
    function = without_partial(function)
    if inspect.isroutine(function) or inspect.isclass(function):
        return function
    return type(function).__call__


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A callable's parameters by name. Raises TypeError or ValueError if it has no signature."""
    if sys.version_info >= (3, 14):  # annotations are evaluated lazily there, and may name missing objects
        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF).parameters
    return inspect.signature(function).parameters


def type_hints(described: Callable[..., Any], *, notes: bool = False) -> dict[str, Any]:
    """The resolvable hints of a function's parameters and its "return", or of a class's fields.

    notes: keep `Annotated` instead of replacing it by its type.
    """
    try:
        return typing.get_type_hints(described, include_extras=notes)
    except Exception:  # an annotation can raise anything: resolve them one by one
        pass
    module = sys.modules.get(getattr(described, "__module__", ""))
    names = getattr(inspect.unwrap(described), "__globals__", vars(module) if module else {})
    resolved: dict[str, Any] = {}
    for name, hint in _annotations(described).items():

        def holder() -> None: ...

        holder.__annotations__ = {name: hint}
        with contextlib.suppress(Exception):
            resolved |= typing.get_type_hints(holder, names, include_extras=notes)
    return resolved


def is_named_tuple(kind: type) -> bool:
    """Whether `kind` was made by `NamedTuple` or `namedtuple`."""
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def field_hints(kind: type) -> dict[str, Any]:
    """The hint of each field of a TypedDict or named tuple; Any for one that cannot be resolved."""
    hints = type_hints(kind)
    return {name: hints.get(name, Any) for name in getattr(kind, "_fields", None) or _annotations(kind)}


def _annotations(described: Callable[..., Any]) -> Mapping[str, Any]:
    if sys.version_info >= (3, 14):
        return annotationlib.get_annotations(described, format=annotationlib.Format.FORWARDREF)
    return inspect.get_annotations(described)
