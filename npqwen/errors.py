"""Exceptions, one for each party who can fix the problem. Every message is one line: the problem and its remedy."""

from __future__ import annotations

import sys


class NpqwenError(Exception):
    """Base class of all errors of this package."""


class CheckpointError(NpqwenError):
    """A Hugging Face checkpoint that cannot be used: not Qwen3, incomplete or damaged."""


class FormatError(NpqwenError):
    """A converted model or a saved file that cannot be read: truncated, altered, or of another format version."""


class ModelNotFoundError(NpqwenError):
    """A model name that is neither a local directory nor a repository on the Hugging Face hub."""


class OptionError(NpqwenError, ValueError):
    """An option that is unknown or outside its range, or two options that exclude each other."""


class OutputError(NpqwenError):
    """An output path that exists already or is not writable, or a full disk."""


class ContextLengthError(NpqwenError, ValueError):
    """More tokens than the model's context or the cache can hold."""


class ClosedError(NpqwenError):
    """The model was closed."""


class OutOfMemoryError(NpqwenError, MemoryError):
    """Too little available memory for the request. Raised before the machine would swap."""


class QueueFullError(NpqwenError):
    """Too many requests are waiting for a model. `retry_after`: seconds after which to try again."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SamplingWarning(UserWarning):
    """Sampling options that Qwen's authors advise against."""


class ThreadsWarning(UserWarning):
    """More threads than CPUs that this process may use, which is slower than as many threads as CPUs."""


class KernelCacheWarning(UserWarning):
    """Compiled kernels cannot be kept, so every process compiles them again, which takes about a minute."""


class PrefixCacheWarning(UserWarning):
    """Files of a prefix cache that were damaged, or cannot be written. Answers are not affected."""


def user_stacklevel() -> int:
    """The `stacklevel` at which a warning of the caller points to the code that uses this package."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "npqwen":
        frame, level = frame.f_back, level + 1
    return level


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
