"""What holds for the events of every answer, however its text is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from npqwen.chat.events import CallArguments, CallStart, Reasoning, Text, UnfinishedCall
from npqwen.chat.reply_parser import ReplyParser
from npqwen.tools.calls import ToolCall


def parsed(*pieces: str, whole: bool = True, **options: Any) -> list[Any]:
    """The events of a text that comes in these pieces, joined and checked; options: of the parser."""
    parser = ReplyParser(**options)
    events = joined([event for piece in pieces for event in parser.push(piece)] + parser.finish(whole))
    check_calls(events)
    return events


def cuts(raw: str, rng: random.Random) -> list[str]:
    """A text in random pieces."""
    places = sorted(rng.choices(range(len(raw) + 1), k=rng.randrange(12)))
    return [raw[a:b] for a, b in zip([0, *places], [*places, len(raw)], strict=True)]


def joined(events: Iterable[Any]) -> list[Any]:
    """The events, with neighbouring pieces of one kind made one."""
    out: list[Any] = []
    for event in events:
        if isinstance(event, Text | Reasoning | CallArguments):
            assert event.text, "an empty piece"
            if out and type(out[-1]) is type(event):
                out[-1] = replace(event, text=out[-1].text + event.text)
                continue
        out.append(event)
    return out


def check_calls(events: Sequence[Any]) -> None:
    """Assert that every call starts, has its arguments as JSON, and ends, before anything else comes."""
    start: CallStart | None = None
    count, text = 0, ""
    for event in events:
        if isinstance(event, CallStart):
            assert start is None
            assert event.index == count
            start, count, text = event, count + 1, ""
        elif isinstance(event, CallArguments):
            assert start is not None
            assert event.index == start.index
            text += event.text
        elif isinstance(event, ToolCall):
            assert start is not None
            assert (event.name, event.id) == (start.name, start.id)
            assert json.loads(text, parse_constant=_refuse) == event.arguments
            start = None
        elif isinstance(event, UnfinishedCall):
            assert start is not None
            assert event == UnfinishedCall(start.index, start.id, start.name, text)
            start = None
        else:
            assert start is None, f"{event} within a call"
    assert start is None, "a call without an end"


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")
