"""Durations as people write them: "5m", "1h30m", "300", "-1"."""

from __future__ import annotations

import re

from npqwen.errors import OptionError
from npqwen.wording import quoted

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d*)?)(ms|s|m|h|d)", re.ASCII)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)


def seconds(text: str) -> float:
    """Seconds of a duration; a number without a unit is in seconds, a negative one means forever.

    Raises OptionError for anything else.
    """
    text = text.strip().lower()
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text)
    found = 0.0
    if _NUMBER.fullmatch(text):
        found = abs(float(text))
    elif rest and re.fullmatch(rf"(?:{_PART.pattern})+", rest, re.ASCII):
        found = sum(float(count) * _UNITS[unit] for count, unit in _PART.findall(rest))
    else:
        raise OptionError(f"{quoted(text)} is not a time such as 5m, 90s or 1h30m; -1: forever")
    if found > 1e9:
        raise OptionError(f"{quoted(text)} is more than 30 years; -1: forever")
    return sign * found
