"""Tables as text: aligned columns, and relative times."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from npqwen.wording import counted


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells, padded to the width of their column and separated by two spaces; no trailing spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def ago(then: float, now: float) -> str:
    """A time relative to another, both in seconds since the epoch: "5 minutes ago"; a date after 30 days or more."""
    seconds = now - then
    if seconds < 60:
        return "just now"
    for name, length, limit in (("minute", 60, 60), ("hour", 3600, 24), ("day", 86400, 30)):
        count = int(seconds // length)
        if count < limit:
            return f"{counted(count, name)} ago"
    return datetime.fromtimestamp(then).astimezone().date().isoformat()
