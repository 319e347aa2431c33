"""Borders in untrusted text, across which no control token can be formed.

A chat template writes the strings of messages and tool schemas between control tokens such as <|im_end|>. A string may
spell out a control token, or a part of one that the template or another string completes. So every such part gets a
border: a character that occurs nowhere else. The rendered text is cut at borders inside the name of a control token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from npqwen.errors import OptionError
from npqwen.tokenizer import Tokenizer

_CANDIDATES = (range(0xF0000, 0x110000), range(0xE000, 0xF0000), range(0x80, 0xD800))
"""Code points for the border: private use first, the others only if the messages contain all of those."""


class Names:
    """The names of some control tokens, and where they may begin or end in untrusted text."""

    def __init__(self, tokenizer: Tokenizer, ids: Iterable[int]) -> None:
        names = {tokenizer.token_bytes(id).decode("utf-8", "replace") for id in ids} - {""}
        # The longest first, as the tokenizer matches them.
        self._names = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        pairs = sorted({pair for name in names for pair in (name[:2], name[-2:]) if len(pair) == 2})
        inside = (f"{re.escape(pair[0])}(?={re.escape(pair[1])})" for pair in pairs)
        self._pairs = re.compile("|".join(inside) or "(?!)")
        self._first = {name[0] for name in names}
        self._last = {name[-1] for name in names}
        self._joined = "\n".join(sorted(names))

    def found(self, texts: Iterable[str]) -> list[str]:
        """The names in these texts, in order."""
        return [name for text in texts for name in self._names.findall(text)]

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of each name in `text`."""
        return (match.span() for match in self._names.finditer(text))

    def with_borders(self, text: str, border: str) -> str:
        """`text` with a border in every name, and in every part of a name that text around it could complete.

        Such parts are the first two and the last two characters of a name, anywhere; the first character of a name at
        the end of the text and the last at its start, ignoring whitespace, which templates strip; and a text that as a
        whole is part of a name.
        """
        body = text.strip()
        if not body:
            return text
        start = len(text) - len(text.lstrip())
        end = start + len(body)
        before = border if body[0] in self._last or body in self._joined else ""
        after = border if body[-1] in self._first else ""
        return text[:start] + before + self._pairs.sub(rf"\g<0>{border}", body) + after + text[end:]


class BorderedText(str):
    """Text with borders that compares like the original, so that template look-ups and conditions do not change."""

    _original: str

    def __new__(cls, text: str, original: str) -> BorderedText:
        bordered = super().__new__(cls, text)
        bordered._original = original
        return bordered

    def __eq__(self, other: object) -> bool:
        return self._original == (other._original if isinstance(other, BorderedText) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: str) -> bool:
        return self._original < (other._original if isinstance(other, BorderedText) else other)

    def __gt__(self, other: str) -> bool:
        return self._original > (other._original if isinstance(other, BorderedText) else other)

    def __hash__(self) -> int:
        return hash(self._original)


class Borders:
    """Puts borders into JSON values."""

    def __init__(self, character: str) -> None:
        self.character = character
        self.any = False
        """Whether a border has been inserted."""

    def within(self, value: Any, names: Names) -> Any:
        """`value` with borders in all its strings, the keys of objects included."""
        if isinstance(value, str):
            text = names.with_borders(value, self.character)
            if len(text) == len(value):
                return value
            self.any = True
            return BorderedText(text, value)
        if isinstance(value, list):
            return [self.within(item, names) for item in value]
        if isinstance(value, dict):
            return {self.within(key, names): self.within(item, names) for key, item in value.items()}
        return value


def unused_character(plain: str, values: Any) -> str:
    """A character that occurs neither in `plain`, the rendered text, nor in the JSON `values` it was rendered from.

    Nor does `plain` contain the character's JSON or Python escape. Raises OptionError if no character qualifies.
    """
    used = set(plain).union(json.dumps(values, ensure_ascii=False))
    for character in map(chr, chain(*_CANDIDATES)):
        if character not in used and not any(escape in plain for escape in _escapes(character)):
            return character
    raise OptionError("the messages hold every character of Unicode; leave some out")


def split(rendered: str, border: str) -> list[str]:
    """The parts of a rendered text between borders, including borders that the template escaped."""
    for escape in _escapes(border):
        rendered = rendered.replace(escape, border)
    return rendered.split(border)


def without_needless_cuts(parts: Sequence[str], names: Names) -> list[str]:
    """`parts`, rejoined where the border between them is not inside the name of a control token."""
    text = "".join(parts)
    cuts: list[int] = []
    at = 0
    for part in parts[:-1]:
        at += len(part)
        cuts.append(at)
    needed = []
    at = 0
    for start, end in names.spans(text):
        while at < len(cuts) and cuts[at] <= start:
            at += 1
        if at < len(cuts) and cuts[at] < end:
            needed.append(cuts[at])
    pieces = [text[a:b] for a, b in zip([0, *needed], [*needed, len(text)], strict=True)]
    # Names may overlap in another vocabulary; then a piece may contain one that no part contains.
    return pieces if names.found(pieces) == names.found(parts) else list(parts)


def _escapes(character: str) -> tuple[str, str]:
    """A character as ASCII-only JSON and Python's repr write it."""
    return json.dumps(character)[1:-1], repr(character)[1:-1]
