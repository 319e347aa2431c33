"""Texts that a command reads, one per line, plain or as JSON, and the JSON lines that it writes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from npqwen.commands.options import keyboard_notice, stdin_text
from npqwen.errors import OptionError
from npqwen.text_file import read_text
from npqwen.wording import quoted

if TYPE_CHECKING:
    from npqwen.terminal.terminal import Terminal

TEXT = "text"
"""The key of the text in a JSON object."""


@dataclass(frozen=True)
class Record:
    """A text, and the JSON object that it came in; for a plain line, an object with the text alone."""

    text: str
    place: str
    """For messages: "line 3 of stdin"."""
    fields: dict[str, Any]


def read_records(file: str, as_json: bool, terminal: Terminal, what: str) -> list[Record]:
    """The lines of a file, or of stdin if it is "-"; blank ones are left out.

    as_json: lines are JSON strings, or objects with a text; those of a file whose name ends in .jsonl or .ndjson
    always are. what: the texts' name, for notices. Raises an OptionError that names the line for anything else.
    """
    if file == "-":
        text = stdin_text(terminal, keyboard_notice(what))
    else:
        as_json = as_json or Path(file).suffix.lower() in (".jsonl", ".ndjson")
        text = read_text(file, file)
    name = "stdin" if file == "-" else file
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    places = [f"line {number} of {name}" for number, _ in numbered]
    read = _record if as_json else lambda line, place: Record(line, place, {TEXT: line})
    return [read(line, place) for (_, line), place in zip(numbered, places, strict=True)]


def _record(line: str, place: str) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise OptionError(f"{place} is not JSON: {quoted(line)}") from None
    fields = {TEXT: value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get(TEXT), str):
        raise OptionError(f"{place} is {quoted(line)}; it must be a JSON string, or an object with a {TEXT}")
    return Record(fields[TEXT], place, fields)


@contextlib.contextmanager
def json_lines(output: str | None, terminal: Terminal) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes an object as a line of JSON: to stdout, or to a file that is replaced atomically."""
    if output is None:
        yield lambda value: terminal.text(_line(value))
        return
    from npqwen.atomic_file import new_file

    with new_file(Path(output)) as file:
        yield lambda value: _write(file, value)


def _write(file: BinaryIO, value: dict[str, Any]) -> None:
    file.write(_line(value).encode())


def _line(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        text = json.dumps(value)
    return f"{text}\n"
