r"""Users' regular expressions for llguidance, where \d and \w are those of Rust's regex: wider than Python's."""

from __future__ import annotations

import re

_PART = re.compile(r"\\.|\[\^?\]?|\]|.", re.DOTALL)
_DIGITS = "0-9"
_LETTERS = r"\p{L}\p{N}_"
_ASCII_LETTERS = "0-9A-Za-z_"


def narrowed_classes(regex: str, *, ascii: bool) -> str:
    r"""`regex` with \d and \w replaced by explicit character classes.

    \d becomes 0 to 9, which is what people mean by it. \w becomes the letters and digits of any script and "_"; with
    `ascii`, as in the patterns of JSON schemas, which are JavaScript's, only those of ASCII. Rust's \d matches the
    digits of all scripts, and its \w also matches marks, which Python's does not.
    """
    inside = False
    parts: list[str] = []
    for part in _PART.findall(regex):
        if part in ("\\d", "\\w"):
            letters = _DIGITS if part == "\\d" else _ASCII_LETTERS if ascii else _LETTERS
            part = letters if inside else f"[{letters}]"
        elif part[0] == "[":
            inside = True
        elif part == "]":
            inside = False
        parts.append(part)
    return "".join(parts)
