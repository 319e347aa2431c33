"""Errors of huggingface_hub as errors of npqwen: one line that says what to do.

Network errors are those of requests or httpx, depending on its version, so they are caught as Exception.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from npqwen.errors import ModelNotFoundError, NpqwenError, OutputError
from npqwen.hub.names import MAIN
from npqwen.wording import shortened


@contextlib.contextmanager
def hub_errors(label: str, problem: str = "") -> Iterator[None]:
    """Turn each of huggingface_hub's errors into one line: ModelNotFoundError, or OutputError on a full disk.

    label: the model, as the message names it. problem: a clause that says why the hub cannot be reached, where only
    huggingface_hub's cache is read.
    """
    try:
        yield
    except NpqwenError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{label} cannot be downloaded: the disk is full") from None
        if _is_a(error, "RevisionNotFoundError"):
            repository, _, revision = label.partition("@")
            raise ModelNotFoundError(
                f"{repository} has no revision {shortened(revision or MAIN)}: no branch, tag or commit of this name"
            ) from None
        if _is_a(error, "GatedRepoError"):
            repository = label.partition("@")[0]
            raise ModelNotFoundError(
                f"{repository} is gated: accept its conditions on https://huggingface.co/{repository}, then log in "
                "with `hf auth login`"
            ) from None
        if is_missing(error):
            raise ModelNotFoundError(
                f"{label} is neither a directory nor a repository on the hub that can be read; "
                "check the name, or log in with `hf auth login` if it is private or gated"
            ) from None
        if problem:
            raise ModelNotFoundError(
                f"{label} is neither a directory nor in the cache of downloads, and {problem}"
            ) from None
        raise ModelNotFoundError(f"{label} cannot be downloaded: {_first_line(error)}") from None


def is_missing(error: Exception) -> bool:
    """Whether the hub has no such repository or revision, or none that this user may read."""
    return _is_a(error, "RepositoryNotFoundError") or _is_a(error, "RevisionNotFoundError")


def _is_a(error: Exception, name: str) -> bool:
    # huggingface_hub.errors has them only since 0.25.
    import huggingface_hub.utils

    return isinstance(error, getattr(huggingface_hub.utils, name))


def hub_problem(error: Exception) -> str:
    """Why the hub cannot be used, as a clause."""
    response = getattr(error, "response", None)
    if getattr(response, "status_code", None) in (401, 403):
        return f"the hub refuses the login ({_first_line(error)}): renew HF_TOKEN, or log in again with `hf auth login`"
    return f"the hub cannot be reached ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return shortened(text.splitlines()[0], 200) if text else type(error).__name__
