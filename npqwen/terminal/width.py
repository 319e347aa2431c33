"""How many columns of a terminal a text takes."""

from __future__ import annotations

import unicodedata

_VISIBLE = frozenset("\u00ad\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Format characters that terminals show: the soft hyphen, and signs of Arabic, Syriac and Kaithi around numbers."""


def width(text: str) -> int:
    """How many columns `text` takes, at least as many as on a terminal that supports all of Unicode."""
    if text.isascii():
        return len(text)
    return sum(letter_width(letter) for letter in text)


def letter_width(letter: str) -> int:
    """How many columns one character takes: 0, 1 or 2."""
    if letter.isascii():
        return 1
    if letter == "\ufe0f":  # turns a narrow sign into an emoji, which is wide
        return 1
    if letter not in _VISIBLE and unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def has_certain_width(letter: str) -> bool:
    """Whether all terminals agree on the width, as for ASCII, European letters, ideographs, kana and hangul."""
    if letter.isascii() or "\u00c0" <= letter <= "\u02af" or "\u0370" <= letter <= "\u0481":
        return True
    return unicodedata.east_asian_width(letter) in "WF" and unicodedata.category(letter) in ("Lo", "Po", "Ps", "Pe")
