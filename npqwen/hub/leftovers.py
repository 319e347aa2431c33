"""What can be removed from the cache: conversions that will not be used again, remains of interrupted work, and kernels
of other versions or machines."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from npqwen.atomic_file import PARTIAL, REMOVED
from npqwen.format.quantization import is_converted
from npqwen.hub.inventory import conversions, staleness
from npqwen.hub.removal import remove

_HIDDEN = re.compile(rf"\.(?P<name>.+)\.(?P<kind>{PARTIAL}|{REMOVED})-[0-9a-f]+", re.ASCII)
_REASONS = {
    PARTIAL: "an interrupted conversion, which could be resumed",
    REMOVED: "an interrupted removal",
}


@dataclass(frozen=True)
class Leftover:
    """Something in the cache that can be removed."""

    path: Path
    reason: str
    """What it is, and why it is not needed."""
    lock: Path | None = None
    """A file that the process to which it belongs keeps locked while it runs."""


def leftovers(root: Path) -> list[Leftover]:
    """Everything that can be removed from the cache directory `root`."""
    return [*stale_conversions(root), *interrupted_work(root), *other_kernels(root)]


def stale_conversions(root: Path) -> list[Leftover]:
    """Conversions that will not be used again."""
    return [
        Leftover(one.path, f"{one.model}{'' if one.bits is None else f', {one.bits} bits'}: {one.stale}")
        for one in conversions(root)
        if one.stale is not None
    ]


def interrupted_work(root: Path) -> list[Leftover]:
    """The remains of interrupted conversions and removals, without those of running processes. Folders that cannot be
    read are left out.

    Those of a killed conversion that hold the model it was to replace, with nothing in its place, are left out: the
    next conversion moves the model back.
    """
    found = []
    for folder in sorted([*root.glob("hub/*"), *root.glob("local/*")]):
        try:
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
        except OSError:  # another user's
            continue
        for path in paths:
            name = _HIDDEN.fullmatch(path.name)
            if name is None or (is_converted(path / "old") and not is_converted(folder / name["name"])):
                continue
            lock = None if name["kind"] == REMOVED else path / "lock"
            if _is_free(lock):
                found.append(Leftover(path, f"{folder.name}: {_REASONS[name['kind']]}", lock))
    return found


def other_kernels(root: Path) -> list[Leftover]:
    """Compiled kernels that this version of npqwen cannot use on this machine."""
    from npqwen.kernels.compiled import usable_directories

    usable = {path.name for path in usable_directories()}
    return [
        Leftover(path, f"{path.name}: kernels of another version or processor")
        for path in sorted(root.glob("kernels/*"))
        if path.name not in usable
    ]


def remove_leftover(leftover: Leftover) -> bool:
    """Remove it unless a process has started to use it, and return whether it was removed. Raises OutputError."""
    with _held(leftover.lock) as free:
        if not free or (is_converted(leftover.path) and _is_needed(leftover.path)):
            return False
        if sys.platform != "win32":
            remove(leftover.path)
            return True
    remove(leftover.path)  # Windows does not rename a directory in which the lock is open
    return True


def _is_needed(path: Path) -> bool:
    """Whether this is a conversion, not its remains, that has become usable since it was found."""
    return not path.name.startswith(".") and staleness(path) is None


def _is_free(lock: Path | None) -> bool:
    with _held(lock) as free:
        return free


@contextlib.contextmanager
def _held(lock: Path | None) -> Iterator[bool]:
    """Hold a lock; yields whether it was acquired: True for None, which locks nothing."""
    from npqwen.file_lock import try_lock

    with contextlib.ExitStack() as stack:
        free = True
        if lock is not None:
            try:
                free = try_lock(stack.enter_context(open(lock, "r+b")))
            except FileNotFoundError:
                pass
            except OSError:  # no locks on this file system, or a file of another user: unknown
                free = False
        yield free
