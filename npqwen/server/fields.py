"""A request's JSON body, field by field: typed access with errors that name the field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request

from npqwen.checks import is_number, number_range, whole_range
from npqwen.errors import OptionError
from npqwen.server.exchange import current
from npqwen.wording import quoted, shortened

MAX_STOPS = 64
"""The most stop strings; each is searched for in every piece of text."""

Value = TypeVar("Value")


class FieldError(OptionError):
    """A body, or a field of it, is invalid or unsupported. `param`: the field's path, such as "messages[2].content"."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Fields:
    """A JSON object of a body. Every getter returns None for a field that is absent or null.

    Fields that are never read are tolerated: clients send fields that only other servers know. `log_unknown` reports
    them.
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        """path: the object's path in the body, for error messages; "" for the body itself."""
        self.values = values
        self.path = path
        self._known: set[str] = set()
        self._children: list[Fields] = []

    def __contains__(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self.any(name) is not None

    def any(self, name: str) -> Any:
        """The field's value, of any type."""
        self._known.add(name)
        return self.values.get(name)

    def place(self, name: str) -> str:
        """The field's path, for error messages: "stream_options.include_usage"."""
        return f"{self.path}.{name}" if self.path else name

    def wrong(self, name: str, must: str) -> NoReturn:
        """Raise FieldError for the field's value. must: what it has to be; completes "it must be"."""
        place = self.place(name)
        raise FieldError(f"{shortened(place, 200)} is {quoted(self.any(name))}; it must be {must}", place)

    def stops(self, name: str) -> list[str] | None:
        """A field with stop strings: a text, or a list of at most MAX_STOPS texts; None if it is absent or null."""
        stop = self.any(name)
        if stop is None or isinstance(stop, str):
            return None if stop is None else [stop]
        if not isinstance(stop, list) or not all(isinstance(string, str) for string in stop):
            self.wrong(name, "text or a list of texts")
        if len(stop) > MAX_STOPS:
            place = self.place(name)
            raise FieldError(f"{place} has {len(stop)} texts; at most {MAX_STOPS} are possible", place)
        return stop

    def refuse(self, name: str, reason: str, *neutral: Any) -> None:
        """Raise FieldError with this reason unless the field is absent, null or one of the `neutral` values."""
        value = self.any(name)
        if value is not None and not any(_equal(value, one) for one in neutral):
            raise FieldError(f"{self.place(name)} is not supported: {reason}", self.place(name))

    def ignore(self, *names: str) -> None:
        """Mark fields as known that have no effect here, such as a user's name."""
        self._known.update(names)

    def text(self, name: str) -> str | None:
        """A string of valid Unicode."""
        value = self.any(name)
        if value is not None and not isinstance(value, str):
            self.wrong(name, "text")
        if value is not None and not _is_unicode(value):
            self.wrong(name, "valid Unicode; it has half a surrogate pair")
        return value

    def one_of(self, name: str, choices: Sequence[str]) -> str | None:
        """One of some strings."""
        value = self.any(name)
        if value is not None and not (isinstance(value, str) and value in choices):
            self.wrong(name, f"one of {', '.join(choices)}")
        return value

    def flag(self, name: str) -> bool | None:
        """true or false."""
        value = self.any(name)
        if value is not None and not isinstance(value, bool):
            self.wrong(name, "true or false")
        return value

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        """A whole number from low to high; 3.0 counts as 3."""
        value = self.any(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if type(value) is not int or value < low or (high is not None and value > high):
            self.wrong(name, whole_range(low, high))
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number from low to high."""
        value = self.any(name)
        if value is None:
            return None
        if not is_number(value) or not low <= value <= high:
            self.wrong(name, number_range(low, high))
        return float(value)

    def items(self, name: str) -> list[Any] | None:
        """A list of anything."""
        value = self.any(name)
        if value is not None and not isinstance(value, list):
            self.wrong(name, "a list")
        return value

    def object(self, name: str) -> Fields | None:
        """An object, as fields."""
        value = self.any(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.wrong(name, "an object")
        return self._child(value, self.place(name))

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object whose names are not fields of the API, such as a JSON schema."""
        value = self.any(name)
        if value is not None and not isinstance(value, dict):
            self.wrong(name, "an object")
        return value

    def objects(self, name: str) -> list[Fields] | None:
        """A list of objects, each as fields."""
        values = self.items(name)
        if values is None:
            return None
        place = self.place(name)
        for at, value in enumerate(values):
            if not isinstance(value, dict):
                raise FieldError(f"{place}[{at}] is {quoted(value)}; it must be an object", f"{place}[{at}]")
        return [self._child(value, f"{place}[{at}]") for at, value in enumerate(values)]

    def required(self, name: str, read: Callable[[str], Value | None]) -> Value:
        """The value that `read(name)`, one of the getters, returns; FieldError if the field is missing or null."""
        value = read(name)
        if value is None:
            place = self.place(name)
            raise FieldError(f"{place} is missing", place)
        return value

    def log_unknown(self) -> None:
        """Have the log's line for the current HTTP request name all fields that were never read, nested ones included.

        To be called once all fields have been read. Does nothing outside of a request.
        """
        exchange = current.get()
        if exchange is not None:
            exchange.ignored = self._unknown()

    def _unknown(self) -> list[str]:
        own = [self.place(name) for name in self.values if name not in self._known]
        return own + [name for child in self._children for name in child._unknown()]

    def _child(self, values: dict[str, Any], path: str) -> Fields:
        child = Fields(values, path)
        self._children.append(child)
        return child


async def read_fields(request: Request) -> Fields:
    """The request's body as fields; FieldError unless it is one JSON object. Any Content-Type is accepted."""
    return parse_fields(await request.body())


def parse_fields(data: bytes) -> Fields:
    """A body as fields; FieldError unless it is one JSON object in UTF-8. Of duplicate keys, the last one counts."""
    if not data.strip():
        raise FieldError("the body is empty; send a JSON object")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FieldError(f"the body is not valid UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except FieldError:
        raise
    except json.JSONDecodeError as error:
        raise FieldError(f"the body is not valid JSON: {error}") from None
    except ValueError:  # by default, Python refuses to convert integers of thousands of digits
        raise FieldError("the body is not valid JSON: a number has too many digits") from None
    except RecursionError:
        raise FieldError("the body is nested too deeply") from None
    if not isinstance(value, dict):
        raise FieldError(f"the body is {quoted(value)}; it must be a JSON object")
    return Fields(value)


def _no_constant(name: str) -> NoReturn:
    raise FieldError(f"the body is not valid JSON: it has {name}")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise FieldError(f"the body has the number {shortened(digits)}, which is too large")
    return value


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same in JSON, where true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
