"""Performance cores, memory and the name of this machine's processor."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, TypeGuard

from npqwen.hardware import cgroup
from npqwen.hardware.cgroup import read

HEADROOM = 64 << 20
"""Bytes of available memory that caches leave to Python, the sampler and the system."""


def default_threads(root: Path = Path("/")) -> int:
    """Number of performance cores this process may use: hyperthreads and efficiency cores are not counted.

    root: where /proc and /sys are.
    """
    if sys.platform == "darwin":
        return _mac_performance_cores() or os.cpu_count() or 1
    if sys.platform == "win32":
        return _windows_performance_cores() or os.cpu_count() or 1
    cpus = root / "sys/devices/system/cpu"
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    capacity = {cpu: _capacity(cpus / f"cpu{cpu}") for cpu in allowed}
    fast = [cpu for cpu in allowed if capacity[cpu] * 4 >= max(capacity.values()) * 3]
    # Intel's efficiency cores may have clocks near the performance cores', but are listed separately.
    listed = _cpu_list(read(root / "sys/devices/cpu_core/cpus") or "") & set(fast)
    cores = {read(cpus / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in listed or fast}
    return max(1, min(len(cores), _quota(root)))


def usable_cpus(root: Path = Path("/")) -> int:
    """The CPUs that this process may use: its affinity (all on macOS and Windows), and its quotas.

    root: where /proc and /sys are.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, _quota(root))


def processor(root: Path = Path("/")) -> str:
    """Name of the processor or the board, as the system reports it. root: where /proc is."""
    facts: dict[str, str] = {}
    for line in (read(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    board = read(root / "proc/device-tree/model")
    for found in (facts.get("model name"), facts.get("Model"), board):  # x86; a Raspberry Pi's board; other boards
        if found:
            return found
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated without swapping, cached files counted as free; None if unknown.

    Limits of containers and other control groups are respected. root: where /proc and /sys are.
    """
    if sys.platform == "darwin":
        return _mac_free_memory()
    if sys.platform == "win32":
        return _windows_memory()[1]
    found = [_meminfo(root).get("MemAvailable"), cgroup.memory(root)]
    return min((count for count in found if count is not None), default=None)


def is_too_little(available: int | None, nbytes: int) -> TypeGuard[int]:
    """Whether `available` bytes of memory are too few for `nbytes` and HEADROOM; false if they are unknown (None)."""
    return available is not None and nbytes > available - HEADROOM


def total_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory in this machine; None if unknown. root: where /proc is."""
    if sys.platform == "darwin":
        total = _sysctl("hw.memsize")
        return int(total) if total.isdigit() else None
    if sys.platform == "win32":
        return _windows_memory()[0]
    return _meminfo(root).get("MemTotal")


def swap_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes of swap space, and of it in use; None if unknown. root: where /proc is."""
    if sys.platform == "darwin":
        found = re.search(r"total = ([\d.]+)M\s+used = ([\d.]+)M", _sysctl("vm.swapusage"))
        return None if found is None else (int(float(found[1]) * (1 << 20)), int(float(found[2]) * (1 << 20)))
    facts = _meminfo(root)
    total, free = facts.get("SwapTotal"), facts.get("SwapFree")
    return None if total is None or free is None else (total, total - free)


def resident_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process occupies, mapped files included; None if unknown. root: where /proc is."""
    if sys.platform == "win32":
        return _windows_resident_memory()
    pages = (read(root / "proc/self/statm") or "").split()
    if len(pages) > 1 and pages[1].isdigit():
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
    found = _command("ps", "-o", "rss=", "-p", str(os.getpid())) if sys.platform == "darwin" else ""
    return int(found) * 1024 if found.isdigit() else None


def _meminfo(root: Path) -> dict[str, int]:
    """The fields of /proc/meminfo in bytes."""
    found = {}
    for line in (read(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * 1024
    return found


def _mac_free_memory() -> int | None:
    """Bytes of free, inactive and speculative pages."""
    found = _command("vm_stat")
    size = re.search(r"page size of (\d+) bytes", found)
    if size is None:
        return None
    counts = dict(re.findall(r"^(.+?):\s+(\d+)\.$", found, re.M))
    names = ("Pages free", "Pages inactive", "Pages speculative")
    return int(size[1]) * sum(int(counts.get(name, 0)) for name in names)


def _windows_memory() -> tuple[int | None, int | None]:
    """(total, available) bytes."""
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    if sys.platform != "win32" or not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return status.ullTotalPhys, status.ullAvailPhys


def _windows_resident_memory() -> int | None:
    if sys.platform != "win32":
        return None
    counters = _MemoryCounters(cb=ctypes.sizeof(_MemoryCounters))
    process = ctypes.c_void_p(-1)  # the pseudo handle of this process
    if not ctypes.windll.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb):
        return None
    return int(counters.WorkingSetSize)


class _MemoryCounters(ctypes.Structure):
    """Windows' PROCESS_MEMORY_COUNTERS."""

    _fields_: ClassVar = [
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
        ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
        ("PagefileUsage", ctypes.c_size_t),
        ("PeakPagefileUsage", ctypes.c_size_t),
    ]


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_: ClassVar = [
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    ]


def _capacity(cpu: Path) -> int:
    """Relative speed of a core: its capacity on Arm, else its highest clock."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        value = read(cpu / name)
        if value and value.isdigit():
            return int(value)
    return 1


def _cpu_list(text: str) -> set[int]:
    """CPU numbers of a list such as "0-3,8"."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return {cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def _quota(root: Path) -> int:
    """Whole CPUs of this process's quota; a large number without a quota."""
    allowed = cgroup.processors(root)
    return 1 << 20 if allowed is None else max(1, int(allowed))


def _windows_performance_cores() -> int:
    if sys.platform != "win32":
        return 0
    query = ctypes.windll.kernel32.GetLogicalProcessorInformationEx
    size = ctypes.c_uint32()
    query(0, None, ctypes.byref(size))  # 0: RelationProcessorCore
    records = ctypes.create_string_buffer(size.value)
    return _cores_of_best_class(records.raw) if query(0, records, ctypes.byref(size)) else 0


def _cores_of_best_class(records: bytes) -> int:
    """Number of Windows' PROCESSOR_RELATIONSHIP records, one per core, with the highest EfficiencyClass."""
    classes = []
    while len(records) >= 10:
        size = int.from_bytes(records[4:8], "little")
        classes.append(records[9])
        records = records[max(size, 10) :]
    return classes.count(max(classes, default=0))


def _sysctl(name: str) -> str:
    return _command("sysctl", "-n", name)


def _command(*words: str) -> str:
    """Output of a system command; empty if it does not exist or fails."""
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _mac_performance_cores() -> int:
    for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):  # Intel Macs have no performance levels
        value = _sysctl(name)
        if value.isdigit():
            return int(value)
    return 0
