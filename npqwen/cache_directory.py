"""Where this user's caches go."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """NPQWEN_CACHE, or `npqwen` in the platform's cache directory.  It need not exist yet."""
    override = os.environ.get("NPQWEN_CACHE")
    if override:
        return Path(os.path.expanduser(override))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "npqwen"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "npqwen"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npqwen"
