"""Limits of Linux control groups (versions 1 and 2): set by containers, systemd units and batch systems."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_UNLIMITED = 1 << 60
"""At least this means no limit: version 1 then reports the largest multiple of a memory page that fits int64."""


def memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still allocate under the tightest limit; None without a limit.

    Cached pages of files count as free: the system evicts them when memory is needed. root: where /proc and /sys are.
    """
    found = [
        *(_left(group, ("memory.max", "memory.high"), "memory.current", "") for group in groups(None, root)),
        *(
            _left(group, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
            for group in _hierarchical(groups("memory", root))
        ),
    ]
    return min((left for left in found if left is not None), default=None)


def processors(root: Path = Path("/")) -> float | None:
    """Number of CPUs that this process's quota amounts to, such as 1.5; None without a limit. root: where /proc is."""
    found = []
    for group in groups(None, root):
        words = (read(group / "cpu.max") or "max").split()
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    for group in groups("cpu", root):
        quota, period = (_number(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and period:
            found.append(quota / period)
    return min(found, default=None)


def groups(controller: str | None, root: Path = Path("/")) -> Iterator[Path]:
    """Directories of this process's group and its parents, innermost first.

    controller: "memory" or "cpu" of version 1, None for version 2. root: where /proc and /sys are.
    """
    own = _own(root, controller)
    if own is None:
        return
    for line in (read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        place, system = before.split(), after.split()
        if len(place) < 5 or len(system) < 3 or system[0] != ("cgroup2" if controller is None else "cgroup"):
            continue
        if controller is not None and controller not in system[2].split(","):
            continue
        mount = root / place[4].lstrip("/")
        # A container often sees only its own group, mounted as the outermost one.
        try:
            parts = PurePosixPath(own).relative_to(place[3]).parts
        except ValueError:
            parts = ()
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth])
        return


def read(path: Path) -> str | None:
    """Text of a file of the system, stripped of line breaks and NULs; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def _own(root: Path, controller: str | None) -> str | None:
    """Path of this process's group relative to the root of its hierarchy."""
    for line in (read(root / "proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3 and (parts[1] == "" if controller is None else controller in parts[1].split(",")):
            return parts[2]
    return None


def _hierarchical(groups: Iterator[Path]) -> Iterator[Path]:
    """The groups of version 1 whose limits apply to the first one: parents only with memory.use_hierarchy."""
    for depth, group in enumerate(groups):
        if depth and _number(group / "memory.use_hierarchy") != 1:
            return
        yield group


def _left(group: Path, limits: tuple[str, ...], usage: str, prefix: str) -> int | None:
    """Bytes left in a group: limit - usage + file cache; None without a limit.

    limits, usage: names of its files. prefix: of the names of memory.stat's hierarchical entries.
    """
    limit = min((n for n in (_number(group / name) for name in limits) if n is not None), default=_UNLIMITED)
    used = _number(group / usage)
    if limit >= _UNLIMITED or used is None:
        return None
    files = 0
    for line in (read(group / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in (f"{prefix}inactive_file", f"{prefix}active_file") and value.isdigit():
            files += int(value)
    return max(0, limit - used + min(files, used))


def _number(path: Path) -> int | None:
    value = read(path)
    return int(value) if value is not None and value.isdigit() else None
