r"""Users' regular expressions for llguidance, where \d and \w are those of Rust's regex: wider than Python's."""

from __future__ import annotations

import re

_PART = re.compile(r"(\[\^?)(\]?(?:\\.|[^\]\\])*)|\\.|.", re.DOTALL)
_ATOM = re.compile(r"\\[pP]\{[^}]*\}|\\.|.", re.DOTALL)
_SET = re.compile(r"\\[dDwWsSpP]")
_DIGITS = "0-9"
_LETTERS = r"\p{L}\p{N}_"
_ASCII_LETTERS = "0-9A-Za-z_"


def narrowed_classes(regex: str, *, ascii: bool) -> str:
    r"""`regex` with \d and \w replaced by explicit character classes.

    \d becomes 0 to 9, which is what people mean by it. \w becomes the letters and digits of any script and "_"; with
    `ascii`, as in the patterns of JSON schemas, which are JavaScript's, only those of ASCII. Rust's \d matches the
    digits of all scripts, and its \w also matches marks, which Python's does not. As in JavaScript, "-" is literal
    beside \w and the like in a class; in Rust it is an error.
    """
    explicit = {r"\d": _DIGITS, r"\w": _ASCII_LETTERS if ascii else _LETTERS}

    def replaced(part: re.Match[str]) -> str:
        if part[1] is not None:
            return part[1] + _class_body(part[2], explicit)
        return f"[{explicit[part[0]]}]" if part[0] in explicit else part[0]

    return _PART.sub(replaced, regex)


def _class_body(body: str, explicit: dict[str, str]) -> str:
    """What is between the brackets of a class, with the sets in `explicit` spelled out."""
    atoms: list[str] = _ATOM.findall(body)
    parts: list[str] = []
    at = 0
    while at < len(atoms):
        here = atoms[at : at + 3]
        if len(here) < 3 or here[1] != "-":
            here = here[:1]
        parts += [r"\-" if atom == "-" else explicit.get(atom, atom) for atom in here]
        if len(here) == 3 and not _SET.match(here[0]) and not _SET.match(here[2]):
            parts[-2] = "-"  # of a range
        at += len(here)
    return "".join(parts)
