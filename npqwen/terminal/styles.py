"""Text styles on a terminal, and styled text.

A style is the parameter string of the escape sequence that sets it (SGR), such as "1;3"; "" is plain text.
"""

from __future__ import annotations

from collections.abc import Iterable

PLAIN, BOLD, DIM, ITALIC, UNDERLINED, STRUCK = "", "1", "2", "3", "4", "9"
CODE = "36"
"""Cyan, which is legible on light and dark backgrounds."""

Run = tuple[str, str]
"""Text, and its style."""
Cell = tuple[str, str]
"""One character, and its style; ("\\n", PLAIN) begins a row."""


def combined(style: str, more: str) -> str:
    """The style that combines both."""
    return f"{style};{more}" if style and more else style or more


def cells(runs: Iterable[Run]) -> list[Cell]:
    """The characters of `runs`."""
    return [(letter, style) for text, style in runs for letter in text]


def rendered(letters: Iterable[Cell]) -> str:
    """The characters with the escape sequences of their styles, reset at the end."""
    parts = []
    present = PLAIN
    for letter, style in letters:
        if style != present:
            parts.append(("\x1b[0m" if present else "") + (f"\x1b[{style}m" if style else ""))
            present = style
        parts.append(letter)
    if present:
        parts.append("\x1b[0m")
    return "".join(parts)
