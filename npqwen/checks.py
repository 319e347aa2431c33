"""Checks of values that callers pass in: whole numbers, numbers, token ids, and names that may be misspelled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from npqwen.errors import OptionError
from npqwen.wording import alternatives, quoted


def check_whole(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """`value` as an int; OptionError unless it is an int or NumPy integer (bool excluded) from `low` to `high`."""
    whole = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if whole is None or whole < low or (high is not None and whole > high):
        raise OptionError(f"{name} is {quoted(value)}; it must be {whole_range(low, high)}")
    return whole


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float or int; OptionError unless it is a number (bool excluded) from `low` to `high`."""
    if not is_number(value) or not low <= value <= high:
        raise OptionError(f"{name} is {quoted(value)}; it must be {number_range(low, high)}")
    return value if isinstance(value, int | float) else float(value)


def check_ids(name: str, ids: Any) -> list[int]:
    """`ids` as a list of ints; OptionError unless it is a sequence or array of whole numbers."""
    if isinstance(ids, str | bytes):
        raise OptionError(f"{name} is text, not token ids; encode it first: model.tokenizer.encode(text)")
    try:
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    except TypeError:
        values = None
    if not isinstance(values, list):
        raise OptionError(f"{name} is {quoted(ids)}; it must be a sequence of token ids")
    for value in values:
        if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise OptionError(f"{name} has {quoted(value)}; each token id must be a whole number")
    return [int(value) for value in values]


def check_path(path: Any) -> Path:
    """`path` as a Path; OptionError unless it is a string or a path-like object."""
    try:
        return Path(path)
    except TypeError:
        raise OptionError(f"the path is {quoted(path)}; it must be a string or a Path") from None


def check_progress(progress: Any) -> None:
    """OptionError unless `progress` is None or can be called."""
    if progress is not None and not callable(progress):
        raise OptionError(f"progress is {quoted(progress)}; it must be a function of (done, total)")


def is_number(value: Any) -> bool:
    """Whether `value` is an int, a float or a NumPy number; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole_range(low: int, high: int | None) -> str:
    """The range as an error message words it."""
    return f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"


def number_range(low: float, high: float) -> str:
    """The range as an error message words it."""
    return f"a number from {low:g} to {high:g}"


def suggestion(name: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """For an unknown name: the known ones that may be meant ("did you mean top_k?"), or all of them.

    elsewhere: names in other programs -> known names.
    """
    known = list(known)
    near = near_names(name, known, elsewhere)
    return f"did you mean {alternatives(near)}?" if near else f"choose from {', '.join(known)}"


def near_names(name: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> list[str]:
    """The known names that a misspelled one may mean, at most four.

    In this order: the one that `elsewhere` translates it to; all that it abbreviates, as "temp" does "temperature"; the
    one that it is closest to. Case, and "-" for "_", do not matter.
    """
    known = list(known)
    plain = _plain(name)
    translated = (elsewhere or {}).get(plain)
    if translated is not None and translated in known:
        return [translated]
    if abbreviated := [one for one in known if plain and _plain(one).startswith(plain)]:
        return abbreviated[:4]
    import difflib

    by_plain = {_plain(one): one for one in known}
    return [by_plain[one] for one in difflib.get_close_matches(plain, by_plain, 1)]


def _plain(name: str) -> str:
    return name.strip("-").lower().replace("-", "_")
