"""The directory of this user's caches: compiled kernels and conversions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from npqwen.errors import OutputError


def cache_directory() -> Path:
    """The environment variable NPQWEN_CACHE, or `npqwen` in the platform's cache directory. It may not exist yet.

    Raises OutputError if the user has no home directory.
    """
    override = os.environ.get("NPQWEN_CACHE")
    if override:
        return Path(os.path.expanduser(override))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local") / "npqwen"
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "npqwen"
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "npqwen"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise OutputError("this user has no home directory for caches; name a directory in NPQWEN_CACHE") from None
