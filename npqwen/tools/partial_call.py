"""A tool call while it streams: its name, and the JSON text of its arguments, piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from npqwen.tools.calls import ToolCall
from npqwen.tools.parameter_value import JSON, Schemas, json_copy, parse_value, stays_text
from npqwen.tools.tagged_call import (
    FUNCTION_END,
    MARK,
    PARAMETER_END,
    parameter_schema,
    properties,
    unquoted,
    value_end,
)

_LONGEST_START = 1000
"""Characters of a block within which a call's arguments must begin for the call to be read while it streams."""
_JSON_START = re.compile(
    r'\s*\{[ \t\r\n]*"name"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.)*")[ \t\r\n]*,'
    r'[ \t\r\n]*"(?:arguments|parameters)"[ \t\r\n]*:[ \t\r\n]*(?=\{)',
    re.DOTALL,
)
_TAGGED_START = re.compile(r"\s*<function=([^<>\n]*)>\s*(?=<parameter=[^<>\n]*>|</function>)")


class PartialCall:
    """Reads the first call of a block that is still being written.

    A call can be read early if it is the first thing in the block, names an available tool (`schemas`) before its
    arguments, and these have begun: `{"name": "f", "arguments": {`, or `<function=f>` and `<parameter=`. Anything else
    is left to `read_calls`, at the end of the block.

    The returned pieces, joined, depend only on the text, not on how it was split.
    """

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._reader: _Reader | None = None
        self._over = False
        """Whether the block is known not to begin with such a call."""
        self.name: str | None = None
        """The tool's name, once it is certain and the arguments have begun."""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The JSON text of the arguments so far."""
        return "".join(self._pieces)

    def read(self, block: str, end: int) -> str:
        """The next piece of the arguments' text that `block[:end]`, the block so far, makes certain."""
        if self._reader is None and not self._over:
            self._begin(block, min(end, _LONGEST_START))
            self._over = self._reader is None and end >= _LONGEST_START
        piece = "" if self._reader is None else self._reader.read(block, end, final=False)
        self._pieces.append(piece)
        return piece

    def finish(self, block: str, call: ToolCall) -> str | None:
        """The last piece of the arguments' text, which completes `call`; None if the block is another call.

        call: the first one that `read_calls` finds in the whole block.
        """
        if self._reader is None or call.name != self.name:
            return None
        block = block.rstrip()
        piece = self._reader.read(block, len(block), final=True)
        try:
            same = json.loads(self.text + piece) == call.arguments
        except (ValueError, RecursionError):
            return None
        if not same:
            return None
        self._pieces.append(piece)
        return piece

    def _begin(self, block: str, end: int) -> None:
        """Set the name and the reader of the arguments if these have begun."""
        reader: _Reader
        if (start := _JSON_START.match(block, 0, end)) is not None:
            try:
                name = json_copy(JSON.decode(start[1])).strip()
            except ValueError:
                return
            reader = _JSONArguments(start.end())
        elif (start := _TAGGED_START.match(block, 0, end)) is not None:
            name = unquoted(start[1])
            reader = _TaggedArguments(start.end(), properties(self._schemas, name))
        else:
            return
        if name in self._schemas:
            self.name, self._reader = name, reader


class _Reader(Protocol):
    def read(self, block: str, end: int, *, final: bool) -> str:
        """The certain text of the arguments in `block[:end]`, after what was returned. final: the block ends there."""


_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_OUTSIDE = re.compile(r'["{}\[\]]')
_CLOSERS = {"{": "}", "[": "]"}
_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{4}")
_HIGH = re.compile(r"\\u[dD][89abAB]")
_LOW = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_LOW_BEGUN = re.compile(r"(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?")


class _JSONArguments:
    """Arguments in JSON: copied, with control characters in strings, lone surrogates and missing brackets corrected.

    at: the index of their opening brace.
    """

    def __init__(self, at: int) -> None:
        self._at = at
        self._closers: list[str] = []
        """The closing brackets of those that are open, the outermost first."""
        self._in_string = False
        self._done = False

    def read(self, block: str, end: int, *, final: bool) -> str:
        out: list[str] = []
        while self._at < end and not self._done:
            at = self._at
            found = (_IN_STRING if self._in_string else _OUTSIDE).search(block, at, end)
            self._at = end if found is None else found.start()
            out.append(block[at : self._at])
            if found is None:
                break
            piece, length = self._mark(block, found.start(), end)
            if not length:
                break
            out.append(piece)
            self._at += length
        if final and not self._in_string:  # models forget brackets
            out += reversed(self._closers)
            self._closers = []
        return "".join(out)

    def _mark(self, block: str, at: int, end: int) -> tuple[str, int]:
        """The text for the character or escape at index `at`, and its length in `block`; 0 if not certain yet."""
        letter = block[at]
        if letter == '"':
            self._in_string = not self._in_string
        elif letter == "\\":
            return _escape(block[at : min(at + 12, end)])
        elif self._in_string:
            return json.dumps(letter)[1:-1], 1
        elif letter in _CLOSERS:
            self._closers.append(_CLOSERS[letter])
        else:
            self._closers.pop()
            self._done = not self._closers
        return letter, 1


def _escape(text: str) -> tuple[str, int]:
    """The escape at the start of `text`, and its length; 0 if more text is needed. A lone surrogate becomes "?"."""
    if len(text) < 2:
        return "", 0
    if text[1] != "u":
        return text[:2], 2
    if _ESCAPE.match(text) is None:
        return (text[:2], 2) if len(text) >= 6 else ("", 0)
    if _LOW.match(text) is not None:
        return "?", 6
    if _HIGH.match(text) is None:
        return text[:6], 6
    if _LOW.match(text, 6) is not None:
        return text, 12
    return ("", 0) if _LOW_BEGUN.fullmatch(text, 6) is not None else ("?", 6)


_VALUE_ENDS = ("<parameter=", FUNCTION_END, PARAMETER_END)
_VALUE_END = re.compile("|".join(_VALUE_ENDS))


class _TaggedArguments:
    """Arguments in Qwen3-Coder's tags: each becomes a member of an object. Strings are emitted as they stream.

    at: the index after the function's tag. properties: the parameters' schemas.
    """

    def __init__(self, at: int, properties: Mapping[str, Any]) -> None:
        self._properties = properties
        self._at = at
        """Where to look for the next tag, or for the end of the value."""
        self._value: _Value | None = None
        """The value that is being written; otherwise a tag is expected."""
        self._next = "{"
        """The text before the next member's name."""
        self._done = False

    def read(self, block: str, end: int, *, final: bool) -> str:
        out: list[str] = []
        while not self._done and (self._read_tag if self._value is None else self._read_value)(out, block, end, final):
            pass
        return "".join(out)

    def _read_tag(self, out: list[str], block: str, end: int, final: bool) -> bool:
        """Read up to the next tag; returns whether there was one."""
        mark = MARK.search(block, self._at, end)
        if mark is None:
            self._at = max(self._at, block.rfind("<", self._at, end))
            if not final:
                return False
        if mark is None or not mark[0].startswith("<parameter"):
            out.append("{}" if self._next == "{" else "}")
            self._done = True
            return True
        name = unquoted(mark[0][len("<parameter=") : -1])
        out.append(f"{self._next}{_quoted(name)}: ")
        self._next = ", "
        self._at = mark.end()
        self._value = _Value(mark.end(), parameter_schema(self._properties, name))
        return True

    def _read_value(self, out: list[str], block: str, end: int, final: bool) -> bool:
        """Read the value as far as it is certain; returns whether it is complete."""
        assert self._value is not None
        closing = block.find(PARAMETER_END, self._at, end)
        if closing < 0 and not final:
            self._at = max(self._at, end - len(PARAMETER_END) + 1)
            out.append(self._value.read(block, end))
            return False
        stop, self._at = value_end(block, self._value.start)
        out.append(self._value.finish(block, stop))
        self._value = None
        return True


class _Value:
    """A parameter's value, which begins at index `start`."""

    def __init__(self, start: int, schema: Any) -> None:
        self.start = start
        self._schema = schema
        self._passed: int | None = None
        """The index up to which the text has been passed on; None if it is not certain to be a string."""
        self._searched = start
        """Where to look for tags that may end the value."""

    def read(self, block: str, end: int) -> str:
        """The JSON text that `block[:end]`, in which the value does not end, makes certain."""
        mark = _VALUE_END.search(block, self._searched, end)
        if mark is not None:  # only the value's end shows whether what follows belongs to it
            end = mark.start()
        else:
            tag = block.rfind("<", max(self._searched, end - len(PARAMETER_END)), end)
            if tag >= 0 and any(mark.startswith(block[tag:end]) for mark in _VALUE_ENDS):
                end = tag
        self._searched = end
        begun = self._passed is not None
        start = self._first(block) if self._passed is None else self._passed
        text = block[start:end].rstrip()  # trailing whitespace may not be part of it
        if not text or not (begun or stays_text(text, self._schema)):
            return ""
        self._passed = start + len(text)
        return ("" if begun else '"') + _quoted(text)[1:-1]

    def finish(self, block: str, end: int) -> str:
        """The rest of the JSON text of the value, which ends at index `end`."""
        if self._passed is None:
            value = block[self.start : end].removeprefix("\n").removesuffix("\n")
            return json.dumps(parse_value(value, self._schema), ensure_ascii=False)
        return _quoted(block[self._passed : end].removesuffix("\n"))[1:]

    def _first(self, block: str) -> int:
        """The index of the value's first character, after the newline that belongs to the tag."""
        return self.start + block.startswith("\n", self.start)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
