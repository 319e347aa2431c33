"""Parts of messages: foreign text and values, sizes, counts and lists of names, as people read them."""

from __future__ import annotations


def shortened(text: str, limit: int = 80) -> str:
    """Text from a file or a server, for a message: on one line, printable, cut to `limit` characters and "..."."""
    printable = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text[: 4 * limit])
    line = " ".join(printable.split())
    return line if len(line) <= limit and len(text) <= 4 * limit else f"{line[:limit]}..."


def quoted(value: object) -> str:
    """`repr(value)` for a message, shortened: values from files and requests may be megabytes long."""
    try:
        return shortened(repr(value))
    except Exception:  # an int of too many digits, or a __repr__ that fails
        return f"a value of type {type(value).__name__}"


def unreadable(path: object, error: OSError) -> str:
    """A message that `path`, or what it is called, cannot be read, with the system's reason."""
    return f"{path} cannot be read: {error.strerror or error}"


def size(count: float) -> str:
    """A number of bytes for people, in powers of ten: "335 MB", "4.7 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def counted(count: float, noun: str) -> str:
    """A number of things for people: "1 message", "2 messages", "2.5 hours". noun: one whose plural ends in s."""
    number = f"{count:g}" if isinstance(count, float) else str(count)
    return f"{number} {noun}{'' if count == 1 else 's'}"


def alternatives(names: list[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
