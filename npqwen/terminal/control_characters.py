"""Text from a model or a file, made harmless for a terminal."""

from __future__ import annotations

_REMOVED = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def without_control_characters(text: str) -> str:
    """The text without C0 and C1 control characters, among them ESC: only newline and tab stay.

    What a terminal would obey - moving the cursor, colours, titles, the clipboard - begins with one of them.
    """
    return text.translate(_REMOVED)
