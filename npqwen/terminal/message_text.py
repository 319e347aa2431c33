"""The syntax of multi-line messages that are typed in a terminal."""

from __future__ import annotations

QUOTES = '"""'


def in_block(text: str) -> bool:
    """Whether `text` has opened a block, with three quotes at its beginning or after a command, and not closed it."""
    block = _block(text)
    return block is not None and not block.rstrip().endswith(QUOTES)


def is_continued(text: str) -> bool:
    """Whether the message continues on the next line: an open block, or a backslash at the end."""
    return in_block(text) or text.endswith("\\")


def joined(text: str, line: str) -> str:
    """A continued message with its next line. The backslash that continues it is removed, except in a block."""
    return f"{text if in_block(text) else text.removesuffix(chr(92))}\n{line}"


def message(text: str) -> str:
    """The message that was typed: line endings become "\\n", a block's quotes are removed, invalid UTF-8 replaced."""
    text = _valid(text).replace("\r\n", "\n").replace("\r", "\n")
    block = _block(text)
    if block is None:
        return text
    inside = block.rstrip().removesuffix(QUOTES).removeprefix("\n").removesuffix("\n")
    return text[: len(text) - len(block) - len(QUOTES)] + inside


def is_yes(text: str) -> bool:
    """Whether an answer to a question means yes."""
    return text.strip().lower() in ("y", "yes")


def _block(text: str) -> str | None:
    """The text after the three quotes that open a block; None if the message opens none.

    Quotes that are closed in the first of several lines open none: pasted Python begins with its docstring.
    """
    start = text.lstrip()
    if start.startswith("/"):
        start = start.partition(" ")[2].lstrip()
    if not start.startswith(QUOTES):
        return None
    block = start.removeprefix(QUOTES)
    first, _, rest = block.partition("\n")
    return None if QUOTES in first and rest.strip() else block


def _valid(text: str) -> str:
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # surrogates that do not represent bytes
        return text.encode("utf-8", "replace").decode()
