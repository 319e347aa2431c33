"""The numbers in a JSON schema: llguidance takes them as doubles, and integers as 64 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from npqwen.checks import is_number
from npqwen.errors import OptionError
from npqwen.structure.subschemas import TABLES
from npqwen.wording import quoted

_EXACT = 2**53 - 1
"""The greatest integer of which a double also holds both neighbours."""
_GREATEST = 2**63 - 1024
"""The greatest double below 2**63. llguidance writes no integers beyond 64 bits."""
_COEFFICIENT = 1_000_000
"""The greatest multipleOf, without its point. llguidance tables all remainders: this takes seconds, 10**7 minutes."""
_UPPER, _LOWER = ("maximum", "exclusiveMaximum"), ("minimum", "exclusiveMinimum")
_VALUES = ("const", "enum")
_NOTES = ("default", "examples")


def exact_numbers(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of a schema whose numbers a text can obey to the digit. name: the schema's, for messages.

    Bounds of at least 64 bits, which mean any integer, are narrowed a little. OptionError for other numbers that
    llguidance would round.
    """
    copy: dict[str, Any] = _copied(schema, name)
    return copy


def _copied(value: Any, name: str, named: bool = False) -> Any:
    """A copy of a part of a schema, whatever keywords it is under: "$ref" may lead anywhere.

    named: whether the part's keys are names rather than keywords.
    """
    if isinstance(value, list):
        return [_copied(one, name) for one in value]
    if not isinstance(value, Mapping):
        return value
    copy = dict(value)
    for key, item in value.items():
        if named or key not in (*_VALUES, *_NOTES, *_UPPER, *_LOWER, "multipleOf"):
            copy[key] = _copied(item, name, named=not named and key in TABLES)
        elif key in _VALUES:
            for number in _numbers(item):
                if abs(number) > _EXACT:
                    raise _rounded(name, key, number, "write it as a string")
        elif key == "multipleOf" and _is_finite(item):
            _check_multiple(item, name)
        elif key not in _NOTES and _is_finite(item):
            copy[key] = _bound(key, item, name)
    return copy


def _bound(key: str, value: float, name: str) -> float:
    """The bound that a schema has under this key, or one that is a little narrower."""
    outward = value if key in _UPPER else -value
    if outward > _GREATEST:
        return _GREATEST if key in _UPPER else -_GREATEST
    inclusive = key in ("minimum", "maximum") and outward >= -_GREATEST
    if abs(value) > _EXACT and not (inclusive and int(float(value)) == value):
        raise _rounded(name, key, value, f"choose one from {-_EXACT} to {_EXACT}")
    return value


def _check_multiple(value: float, name: str) -> None:
    digits = Decimal(str(value)).as_tuple().digits if abs(value) < 10**20 else (9,) * 20
    if int("".join(map(str, digits))) > _COEFFICIENT:
        most = f"at most {_COEFFICIENT:,}, or a fraction of at most 6 digits"
        raise OptionError(f"{name} has {quoted(value)} as multipleOf; choose one of {most}")


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that JSON has; an int may be too large for `math.isfinite`."""
    return is_number(value) and value - value == 0


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if _is_finite(value):
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(one)


def _rounded(name: str, key: str, value: float, remedy: str) -> OptionError:
    return OptionError(f"{name} has {quoted(value)} as {key}, of which the last digits would be lost; {remedy}")
