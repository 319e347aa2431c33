"""Whether a model's threads have the CPUs to themselves: they wait for one another, so a slow one delays them all."""

from __future__ import annotations

import os
import time
from pathlib import Path

from npqwen.hardware.cgroup import read
from npqwen.hardware.machine import usable_cpus

_SHORTEST = 0.3
"""Fewest seconds of observation for a result: bursts of other programs are short."""
_MISSING = 0.7
"""Fewest CPUs that must be missing for a hint."""
_LOAD = 0.5
"""Lowest load average of the last minute for a hint: another program must have been busy for a while."""


def too_many_threads(threads: int) -> str | None:
    """A warning if there are more threads than CPUs that this process may use, else None."""
    cpus = usable_cpus()
    if threads <= cpus:
        return None
    allowed = "1 CPU" if cpus == 1 else f"{cpus} CPUs"
    return f"{threads} threads are slower than {cpus}: this process may use only {allowed}"


class Contention:
    """How much other programs use this process's CPUs, since the object's creation. Known on Linux only.

    Programs with a lower priority (`nice`) do not count. root: where /proc is.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._start = time.monotonic()
        self._own = _own()
        self._before = self._others()

    def busy(self) -> float | None:
        """The number of CPUs that others have kept busy on average; None if unknown, or observed too briefly."""
        seconds = time.monotonic() - self._start
        now = self._others()
        if self._before is None or now is None or seconds < _SHORTEST:
            return None
        return max(0.0, now - self._before) / seconds

    def hint(self, threads: int, computed: float = 0) -> str | None:
        """What to try if others leave too few CPUs for this many threads; None if they do not, or nothing helps.

        computed: fewest seconds of processor time, of all threads, that this process must have used since then.
        """
        busy = self.busy()
        if busy is None or _own() - self._own < computed or os.getloadavg()[0] < _LOAD:
            return None
        left = len(self._cpus) - busy
        better = max(1, round(left))
        if threads - left < _MISSING or better >= threads:
            return None
        return (
            f"other programs keep {busy:.1f} of {len(self._cpus)} CPUs busy, which delays all {threads} threads: "
            f"--threads {better} may be faster"
        )

    def _others(self) -> float | None:
        """CPU seconds that other programs have used on these CPUs since the start of the system; None if unknown."""
        fields = [line.split() for line in (read(self._root / "proc/stat") or "").splitlines()]
        used = [
            int(words[1]) + int(words[3])  # user and system; niced programs are counted separately
            for words in fields
            if words[0].startswith("cpu") and words[0][3:].isdigit() and int(words[0][3:]) in self._cpus
        ]
        if not used:
            return None
        own = os.times()
        niced = os.nice(0) > 0  # then this process's own user time is counted separately, too
        return sum(used) / os.sysconf("SC_CLK_TCK") - own.system - (0 if niced else own.user)


def _own() -> float:
    """Seconds of processor time that this process has used."""
    times = os.times()
    return times.user + times.system
