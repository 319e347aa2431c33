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
