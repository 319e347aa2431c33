"""What this machine offers: threads and memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """One thread for each performance core this process may use: no second threads of a core, no slow cores."""
    if sys.platform == "darwin":
        return _mac_performance_cores() or os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        # Windows counts two threads a core on x86.
        count = os.cpu_count() or 1
        return max(1, count // 2) if platform.machine().lower() in ("amd64", "x86_64") and count > 2 else count
    allowed = os.sched_getaffinity(0)
    capacity = {cpu: _capacity(cpu) for cpu in allowed}
    fast = [cpu for cpu in allowed if capacity[cpu] * 4 >= max(capacity.values()) * 3]
    cores = {_read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in fast}
    return max(1, min(len(cores), _quota()))


def processor() -> str:
    """The processor's name, as the system tells it."""
    facts: dict[str, str] = {}
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    for name in ("model name", "Model"):  # x86; a Raspberry Pi's board
        if facts.get(name):
            return facts[name]
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes that can be had without swapping, the page cache counted; None if the system does not tell."""
    found = []
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit = _read(_own_cgroup() / "memory.max") or ""
    if limit.isdigit():
        found.append(int(limit))
    if sys.platform == "darwin" and (total := _sysctl("hw.memsize")):
        found.append(int(total))
    return min(found, default=None)


def _own_cgroup() -> Path:
    """This process's control group (version 2): a container's limits."""
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        if line.startswith("0::"):
            return Path("/sys/fs/cgroup") / line[3:].lstrip("/")
    return Path("/sys/fs/cgroup")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _capacity(cpu: int) -> int:
    """A core's relative speed: Arm tells its capacity, others their highest clock."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        value = _read(_CPUS / f"cpu{cpu}" / name)
        if value and value.isdigit():
            return int(value)
    return 1


def _quota() -> int:
    """Cores that a container's limit leaves."""
    words = (_read(_own_cgroup() / "cpu.max") or "max").split()
    if words[0] == "max":
        return 1 << 20
    return max(1, int(words[0]) // int(words[1]))


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _mac_performance_cores() -> int:
    value = _sysctl("hw.perflevel0.physicalcpu")
    return int(value) if value.isdigit() else 0
