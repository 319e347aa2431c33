"""How much memory this process has taken at most, and how much disk directories take now. Not on Windows."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from pathlib import Path


def memory() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux' getrusage includes the parent process.
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def disk(directories: Iterable[Path]) -> int:
    """Bytes that all files in some directories occupy; the holes of sparse files take none."""
    files = (path for directory in directories for path in directory.rglob("*") if path.is_file())
    return sum(512 * path.stat().st_blocks for path in files)
