"""What this machine offers, read from systems made of files: memory, processors, limits of control groups."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
from fake_system import MIB, MOUNTS, raspberry_pi, tree

from npqwen.hardware import cgroup, machine

GROUP = {"memory.current": str(600 * MIB), "memory.stat": f"anon 5\ninactive_file {90 * MIB}\nactive_file {10 * MIB}"}
FIRST = {
    "memory.usage_in_bytes": str(600 * MIB),
    "memory.use_hierarchy": "1",
    # Those of the group alone come before those with the groups inside.
    "memory.stat": f"inactive_file 1\nactive_file 1\ntotal_inactive_file {90 * MIB}\ntotal_active_file {10 * MIB}",
}
NONE = "9223372036854771712"


def place(group: str, files: dict[str, str]) -> dict[str, str]:
    return {f"sys/fs/cgroup/{group}/{name}".replace("//", "/"): text for name, text in files.items()}


@pytest.mark.parametrize(
    ("own", "outer", "left"),
    [
        ({"memory.max": str(1000 * MIB)}, {"memory.max": "max"}, 500),  # what the group holds of files is free
        ({"memory.max": "max"}, {"memory.max": "max"}, None),
        ({"memory.max": str(1000 * MIB), "memory.high": str(800 * MIB)}, {}, 300),
        ({"memory.max": str(1000 * MIB)}, {"memory.max": str(700 * MIB)}, 200),  # the tighter one is around it
        ({"memory.max": "max"}, {"memory.max": str(400 * MIB)}, 0),
        ({}, {}, None),
    ],
)
def test_memory_limits_of_version_2(
    tmp_path: Path, own: dict[str, str], outer: dict[str, str], left: int | None
) -> None:
    files = {"proc/self/cgroup": "0::/user.slice/app.scope", "proc/self/mountinfo": MOUNTS}
    files |= place("unified/user.slice", GROUP | outer) | place("unified/user.slice/app.scope", GROUP | own)
    assert cgroup.memory(tree(tmp_path, files)) == (None if left is None else left * MIB)


@pytest.mark.parametrize(
    ("own", "outer", "left"),
    [
        (1000 * MIB, NONE, 500),
        (NONE, NONE, None),
        (NONE, 700 * MIB, 200),
        (550 * MIB, 700 * MIB, 50),
    ],
)
def test_memory_limits_of_version_1(tmp_path: Path, own: object, outer: object, left: int | None) -> None:
    files = {"proc/self/cgroup": "9:cpu,cpuacct:/\n4:memory:/batch/job\n0::/", "proc/self/mountinfo": MOUNTS}
    files |= place("memory/batch", FIRST | {"memory.limit_in_bytes": str(outer)})
    files |= place("memory/batch/job", FIRST | {"memory.limit_in_bytes": str(own)})
    assert cgroup.memory(tree(tmp_path, files)) == (None if left is None else left * MIB)
    # An outer group that does not count the groups inside does not bind them.
    tree(tmp_path, place("memory/batch", {"memory.use_hierarchy": "0"}))
    expected = None if own == NONE else int(str(own)) - 500 * MIB
    assert cgroup.memory(tmp_path) == expected


@pytest.mark.parametrize(
    ("own", "mounted"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/docker/abc", "/"), ("/../other", "/"), ("/a:b", "/a:b")],
)
def test_a_container_sees_its_group_as_the_outermost(tmp_path: Path, own: str, mounted: str) -> None:
    line = f"31 22 0:27 {mounted} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw"
    files = {"proc/self/cgroup": f"0::{own}", "proc/self/mountinfo": line}
    files |= place("", GROUP | {"memory.max": str(1000 * MIB), "cpu.max": "150000 100000"})
    assert cgroup.memory(tree(tmp_path, files)) == 500 * MIB
    assert cgroup.processors(tmp_path) == 1.5


def test_processors_of_version_1(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "9:cpuacct,cpu:/job", "proc/self/mountinfo": MOUNTS}
    quota = {"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}
    assert cgroup.processors(tree(tmp_path, files | place("cpu,cpuacct/job", quota))) == 2.5
    tree(tmp_path, place("cpu,cpuacct/job", {"cpu.cfs_quota_us": "-1"}))
    assert cgroup.processors(tmp_path) is None


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "4:memory", "4:memory:/x\n0::/y"])
def test_files_that_say_nothing(tmp_path: Path, text: str) -> None:
    files = {"proc/self/cgroup": text, "proc/self/mountinfo": f"{text}\n{MOUNTS}\n1 2 3 - x", "proc/meminfo": text}
    assert cgroup.memory(tree(tmp_path, files)) is None
    assert cgroup.processors(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's files")
def test_memory_of_a_raspberry_pi(tmp_path: Path) -> None:
    root = raspberry_pi(tmp_path)
    assert machine.total_memory(root) == 8245280 * 1024
    assert machine.available_memory(root) == 7000000 * 1024
    assert machine.processor(root) == "Raspberry Pi 5 Model B Rev 1.0"
    limit = GROUP | {"memory.max": str(1000 * MIB)}
    tree(root, place("user.slice/user-1000.slice/session-1.scope", limit))
    assert machine.available_memory(root) == 500 * MIB
    assert machine.available_memory(tmp_path / "nothing") is None


def cpus(count: int, **files: list[str]) -> dict[str, str]:
    """Files of `count` processors, by name with / as __: one text each."""
    return {
        f"sys/devices/system/cpu/cpu{n}/{name.replace('__', '/')}": texts[n]
        for name, texts in files.items()
        for n in range(count)
    }


PAIRS = [f"{n // 2 * 2}-{n // 2 * 2 + 1}" for n in range(12)]
INTEL = cpus(12, topology__thread_siblings_list=[*PAIRS[:8], *"89", "10", "11"])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's files")
@pytest.mark.parametrize(
    ("count", "files", "threads"),
    [
        (4, {}, 4),  # a Raspberry Pi
        (8, cpus(8, topology__thread_siblings_list=PAIRS), 4),
        (8, cpus(8, cpu_capacity=["430"] * 4 + ["1024"] * 4), 4),
        (8, cpus(8, cpu_capacity=["300"] * 3 + ["870"] * 4 + ["1024"]), 5),
        (12, INTEL | cpus(12, cpufreq__cpuinfo_max_freq=["4700000"] * 8 + ["3400000"] * 4), 4),
        # Three quarters of the fast cores' clock: only the list tells them apart.
        (12, INTEL | cpus(12, cpufreq__cpuinfo_max_freq=["5200000"] * 8 + ["3900000"] * 4), 8),
        (12, INTEL | {"sys/devices/cpu_core/cpus": "0-7", "sys/devices/cpu_atom/cpus": "8-11"}, 4),
        (2, {"sys/devices/cpu_core/cpus": "4-7"}, 2),  # it may run on slow ones only
        (
            4,
            {"proc/self/cgroup": "0::/a", "proc/self/mountinfo": MOUNTS} | place("unified/a", {"cpu.max": "250 100"}),
            2,
        ),
        (
            4,
            {"proc/self/cgroup": "0::/a", "proc/self/mountinfo": MOUNTS} | place("unified/a", {"cpu.max": "50 100"}),
            1,
        ),
    ],
)
def test_threads(
    count: int, files: dict[str, str], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))
    assert machine.default_threads(tree(tmp_path, files)) == threads


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's files")
def test_threads_where_the_system_has_no_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert machine.default_threads(tmp_path) == 3


def test_threads_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_command", lambda *words: {"hw.perflevel0.physicalcpu": "6"}.get(words[-1], ""))
    assert machine.default_threads() == 6
    # One with an Intel processor: cores of one kind, and two threads in each.
    monkeypatch.setattr(machine, "_command", lambda *words: {"hw.physicalcpu": "4"}.get(words[-1], ""))
    assert machine.default_threads() == 4
    monkeypatch.setattr(machine, "_command", lambda *words: "")
    assert machine.default_threads() == (os.cpu_count() or 1)


def record(flags: int, efficiency: int, groups: int = 1) -> bytes:
    """Windows' SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX of a core, by its documentation."""
    body = struct.pack("<BB20xH", flags, efficiency, groups) + groups * struct.pack("<QH6x", 3, 0)
    return struct.pack("<II", 0, 8 + len(body)) + body


@pytest.mark.parametrize(
    ("records", "count"),
    [
        ([record(1, 1)] * 6 + [record(0, 0)] * 8, 6),
        ([record(1, 0, 2)] * 64, 64),
        ([record(0, 0)], 1),
        ([], 0),
        ([bytes(12)], 1),  # a record of size 0 does not cause an endless loop
    ],
)
def test_cores_of_windows(records: list[bytes], count: int) -> None:
    assert machine._cores_of_best_class(b"".join(records)) == count


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's files")
def test_boards_that_only_the_device_tree_names(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/cpuinfo": "processor\t: 0", "proc/device-tree/model": "Radxa ROCK 5B\0"})
    assert machine.processor(root) == "Radxa ROCK 5B"


VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               5000.
Pages active:                           190000.
Pages inactive:                         180000.
Pages speculative:                         700.
Pages throttled:                             0.
Pages purgeable:                          3000.
"Translation faults":                 99999999.
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's files")
def test_swap_space(tmp_path: Path) -> None:
    assert machine.swap_memory(tmp_path) is None
    tree(tmp_path, {"proc/meminfo": "MemTotal: 10 kB\nSwapTotal:  2097148 kB\nSwapFree:   2000000 kB"})
    assert machine.swap_memory(tmp_path) == (2097148 * 1024, 97148 * 1024)
    tree(tmp_path, {"proc/meminfo": "SwapTotal: 0 kB\nSwapFree: 0 kB"})
    assert machine.swap_memory(tmp_path) == (0, 0)


def test_swap_space_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "total = 2048.00M  used = 512.50M  free = 1535.50M  (encrypted)"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_command", lambda *words: said)
    assert machine.swap_memory() == (2 << 30, 512 << 20 | 1 << 19)


def test_memory_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"vm_stat": VM_STAT, "sysctl": "17179869184"}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_command", lambda *words: said[words[0]])
    assert machine.available_memory() == 16384 * 185_700
    assert machine.total_memory() == 1 << 34
    said |= {"vm_stat": "", "sysctl": ""}
    assert machine.available_memory() is None
    assert machine.total_memory() is None


def test_a_command_that_is_not_there_or_fails() -> None:
    assert machine._command("npqwen-no-such-command") == ""
    assert machine._command(sys.executable, "-c", "print('half'); raise SystemExit(3)") == ""
    assert machine._command(sys.executable, "-c", "print(' told ')") == "told"


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="needs POSIX")
def test_memory_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/statm").write_text("9000 1234 5 6 0 7 0\n")
    assert machine.resident_memory(tmp_path) == 1234 * os.sysconf("SC_PAGE_SIZE")
    assert machine.resident_memory(tmp_path / "nothing") is None
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_command", lambda *words: "2048")
    assert machine.resident_memory(tmp_path / "nothing") == 2048 * 1024
