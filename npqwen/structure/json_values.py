"""JSON values from callers, copied into plain Python types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npqwen.errors import OptionError

_MAX_DEPTH = 128
"""The greatest nesting depth: printing values recurses. Calls written by models have a lower limit
(`parameter_value.py`)."""


def plain(value: Any, where: str) -> Any:
    """A copy of a JSON value made of dict, list, str, int, float, bool and None only; tuples become lists.

    where: names the value in error messages. Raises OptionError for anything that JSON cannot represent.

    Chat templates are programs that come with a model: they must not receive objects with methods of their own.
    """
    return _plain(value, where, _MAX_DEPTH)


def _plain(value: Any, where: str, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping | list | tuple) and not depth:
        raise OptionError(f"{where[:60]}... is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise OptionError(f"{where} has a key that is not a string")
        texts = {_text(key, f"a key of {where}"): item for key, item in value.items()}
        return {key: _plain(item, f"{where}[{key!r}]", depth - 1) for key, item in texts.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{at}]", depth - 1) for at, item in enumerate(value)]
    raise OptionError(f"{where} is of type {type(value).__name__}, which is not a JSON value")


def _text(value: str, where: str) -> str:
    """A string's characters as a str, whatever its class prints, as enums do."""
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{where} is not valid Unicode: it contains half a surrogate pair") from None
    return text
