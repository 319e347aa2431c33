"""Tables for people: aligned columns, and times as one says them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells, each as wide as the widest of its column, two blanks between; no blanks at the end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def ago(then: float, now: float) -> str:
    """A time in seconds since the epoch, as seen from another: "5 minutes ago"; a date if it is over a month ago."""
    seconds = now - then
    if seconds < 60:
        return "just now"
    for name, length, limit in (("minute", 60, 60), ("hour", 3600, 24), ("day", 86400, 30)):
        count = int(seconds // length)
        if count < limit:
            return f"{count} {name}{'' if count == 1 else 's'} ago"
    return datetime.fromtimestamp(then).astimezone().date().isoformat()
