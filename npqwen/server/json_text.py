"""JSON as every API writes it."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Characters that JSON allows in strings, and at which clients split lines: Python's `str.splitlines`, for one."""


def json_text(value: Any) -> str:
    """`value` as JSON on one line, encodable as UTF-8; half a surrogate pair is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_LINE_ENDS)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text


def server_sent(value: Any, event: str | None = None) -> str:
    """A server-sent event with `value` as its JSON data. event: its type, if the API names types."""
    return f"{f'event: {event}' + chr(10) if event else ''}data: {json_text(value)}\n\n"


class JSONReply(Response):
    """A response whose body is one JSON value."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_text(content).encode()
