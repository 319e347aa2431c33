"""The disk space of files and directories. A file with several names (hard links) is one file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def _files(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    """The state of every file below some paths, links not followed. Files that are removed meanwhile are left out."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            for folder, _, names in os.walk(path):
                yield from _states(os.path.join(folder, name) for name in names)
        else:
            yield from _states([str(path)])


def bytes_of(paths: Iterable[Path]) -> int:
    """Bytes of the files below some paths; one with several names (hard links) counts once."""
    return sum({(state.st_dev, state.st_ino): state.st_size for state in _files(paths)}.values())


def freed_bytes(paths: Iterable[Path]) -> int:
    """Bytes that removing some paths frees: a file with another name (hard link) elsewhere frees none."""
    found: dict[tuple[int, int], list[os.stat_result]] = {}
    for state in _files(paths):
        found.setdefault((state.st_dev, state.st_ino), []).append(state)
    return sum(states[0].st_size for states in found.values() if len(states) >= states[0].st_nlink)


def _states(names: Iterable[str]) -> Iterator[os.stat_result]:
    for name in names:
        try:
            yield os.lstat(name)
        except FileNotFoundError:
            continue
