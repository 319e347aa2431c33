"""A system's files below a directory: /proc, /sys and /etc of Linux."""

from __future__ import annotations

from pathlib import Path

MOUNTS = """\
22 1 179:2 / / rw,noatime - ext4 /dev/mmcblk0p2 rw
30 22 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw
31 22 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
32 22 0:28 / /sys/fs/cgroup/memory rw,nosuid shared:10 - cgroup cgroup rw,memory
"""
MIB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write files by their paths below root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    return root


def raspberry_pi(root: Path, degrees: float = 48.2, mhz: int = 2400) -> Path:
    """A Raspberry Pi 5 of 8 GB with its system."""
    clocks = {
        f"sys/devices/system/cpu/cpu{n}/cpufreq/{name}": text
        for n in range(4)
        for name, text in (
            ("scaling_cur_freq", f"{mhz}000"),
            ("scaling_max_freq", "2400000"),
            ("scaling_governor", "ondemand"),
        )
    }
    return tree(
        root,
        {
            "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd0b\n\nRevision\t: d04170\nSerial\t\t: c0ffee0123456789\n"
            "Model\t\t: Raspberry Pi 5 Model B Rev 1.0",
            "proc/meminfo": "MemTotal:        8245280 kB\nMemFree:         1000000 kB\nMemAvailable:    7000000 kB",
            "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-1.scope",
            "proc/self/mountinfo": "30 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw",
            "proc/self/status": "VmHWM:\t  612000 kB\nRssAnon:\t  110000 kB",
            "etc/os-release": 'NAME="Debian GNU/Linux"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"',
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": str(int(1000 * degrees)),
            **clocks,
        },
    )
