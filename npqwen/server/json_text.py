"""JSON as every API writes it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from starlette.responses import Response

_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Characters that JSON allows in strings, but at which some clients split lines, such as with `str.splitlines`."""


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def json_text(value: Any) -> str:
    """`value` as JSON on one line, encodable as UTF-8; a lone surrogate is escaped."""
    text = _encode(value)
    if text.isascii():
        return text
    text = text.translate(_LINE_ENDS)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text


def with_list(head: dict[str, Any], name: str, values: Iterable[Any]) -> str:
    """`head | {name: [*values]}` as JSON. head: not empty.

    Values are encoded one at a time, so that other threads can run in between: one call for all may take seconds.
    """
    listed = ",".join([json_text(value) for value in values])
    return f"{json_text(head)[:-1]},{json_text(name)}:[{listed}]}}"


def server_sent(value: Any, event: str | None = None) -> str:
    """A server-sent event with `value` as its JSON data. event: its type, if the API names types."""
    return f"{f'event: {event}' + chr(10) if event else ''}data: {json_text(value)}\n\n"


class SentText:
    """Server-sent events that differ in one string: the rest is encoded once.

        sent = SentText(lambda text: {"id": 1, "text": text})
        sent("a")  # server_sent({"id": 1, "text": "a"})
    """

    def __init__(self, data: Callable[[str], Any]) -> None:
        """data(text): the event's data, with the text as one of its strings."""
        mark = secrets.token_hex(16)
        self._before, self._after = server_sent(data(mark)).split(json_text(mark))

    def __call__(self, text: str) -> str:
        return f"{self._before}{json_text(text)}{self._after}"


class JSONReply(Response):
    """A response whose body is one JSON value."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_text(content).encode()
