"""Repositories on the Hugging Face hub: their newest commit, and their files, through huggingface_hub.

What its client raises becomes one line. Network errors are those of requests or httpx, by its version, so they are
caught as Exception.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from npqwen.errors import ModelNotFoundError, NpqwenError, OutputError, shortened

# The files of a conversion. Weights of other frameworks stay on the hub.
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
# Of subdirectories, only additional_chat_templates is needed.
_IGNORED = ["*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*"]


def latest_commit(repository: str) -> tuple[str | None, str]:
    """The newest commit of a repository; or None, and a clause that says why the hub cannot be used.

    Raises ModelNotFoundError if there is no such repository, or none that this user may read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError  # type: ignore[attr-defined]

    with _errors(repository):
        try:
            commit = HfApi().model_info(repository, timeout=10).sha
            return commit or None, "" if commit else "the hub names no commit"
        except Exception as error:
            # After these two another attempt is pointless. A proxy may also answer with a page instead of JSON.
            if isinstance(error, HFValidationError) or _is_missing(error):
                raise
            return None, _problem(error)


def download(repository: str, problem: str, *, bars: bool) -> Path:
    """Download what is missing of a repository into huggingface_hub's own cache; returns the directory there.

    problem: the clause of `latest_commit`; unless empty, only a complete earlier download is returned.
    bars: let huggingface_hub draw its progress bars on stderr.
    Raises ModelNotFoundError if there is no copy, OutputError if the disk is full.
    """
    from huggingface_hub import snapshot_download

    with _errors(repository, problem), _progress_bars(bars):
        path = snapshot_download(
            repository, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED, local_files_only=bool(problem)
        )
    return Path(path)


@contextlib.contextmanager
def _errors(repository: str, problem: str = "") -> Iterator[None]:
    """Turn each of huggingface_hub's errors into one line."""
    try:
        yield
    except NpqwenError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{repository} cannot be downloaded: the disk is full") from None
        if _is_missing(error):
            raise ModelNotFoundError(
                f"there is no directory {repository}, and no such repository on the hub that you may read; "
                "check the name, or log in with `hf auth login` if it is private or gated"
            ) from None
        if problem:
            raise ModelNotFoundError(
                f"there is no directory {repository}, it is not in the cache, and {problem}"
            ) from None
        raise ModelNotFoundError(f"{repository} cannot be downloaded: {_first_line(error)}") from None


def _is_missing(error: Exception) -> bool:
    # huggingface_hub.errors has it only since 0.25.
    from huggingface_hub.utils import RepositoryNotFoundError  # type: ignore[attr-defined]

    return isinstance(error, RepositoryNotFoundError)


def _problem(error: Exception) -> str:
    """Why the hub cannot be used, as a clause."""
    response = getattr(error, "response", None)
    if getattr(response, "status_code", None) in (401, 403):
        return f"the hub refuses the login ({_first_line(error)}): renew HF_TOKEN, or log in again with `hf auth login`"
    return f"the hub cannot be reached ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return shortened(text.splitlines()[0], 200) if text else type(error).__name__


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
