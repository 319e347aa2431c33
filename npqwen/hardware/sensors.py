"""Heat, clocks and throttling: what a benchmark on a small board is worth, where Linux tells it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from npqwen.hardware.cgroup import read

_THROTTLED = {
    0: "under-voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""Bits of a Raspberry Pi's `vcgencmd get_throttled`: now; 16 higher, since it was started."""
_PROCESSORS = ("coretemp", "k10temp", "zenpower")
"""Drivers of x86 processors' own sensors, which are no thermal zones."""


@dataclass(frozen=True)
class Sensors:
    """One moment."""

    temperatures: dict[str, float]
    """Degrees Celsius, by the sensor's name."""
    clocks: list[int]
    """MHz of every processor now; empty where the system does not tell."""
    fastest: list[int]
    """MHz that the system allows each of them."""
    governor: str | None
    throttled: int | None
    """A Raspberry Pi's flags."""
    slowdowns: int | None
    """How often an x86 processor slowed down for heat since it was started, all cores together."""


def read_sensors(root: Path = Path("/"), get_throttled: Callable[[], str] | None = None) -> Sensors:
    """What the files below root/sys say.

    get_throttled: what asks a Raspberry Pi's firmware, None: nobody.  It takes milliseconds, the rest far less.
    """
    cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*"), key=lambda cpu: int(cpu.name[3:]))
    flags = re.search(r"throttled=0x([0-9a-fA-F]+)", get_throttled()) if get_throttled is not None else None
    slowdowns = _numbers(cpu / "thermal_throttle/core_throttle_count" for cpu in cpus)
    return Sensors(
        temperatures=_temperatures(root),
        clocks=[khz // 1000 for khz in _numbers(cpu / "cpufreq/scaling_cur_freq" for cpu in cpus)],
        fastest=[khz // 1000 for khz in _numbers(cpu / "cpufreq/scaling_max_freq" for cpu in cpus)],
        governor=read(cpus[0] / "cpufreq/scaling_governor") if cpus else None,
        throttled=int(flags[1], 16) if flags else None,
        slowdowns=sum(slowdowns) if slowdowns else None,
    )


def vcgencmd() -> str:
    """What a Raspberry Pi's firmware says of throttling; nothing on another machine."""
    try:
        done = subprocess.run(
            ["vcgencmd", "get_throttled"], capture_output=True, encoding="utf-8", errors="replace", timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def throttling(flags: int) -> str:
    """A Raspberry Pi's flags for people: `under-voltage now, throttled since it was started`."""
    said = [f"{name} now" for bit, name in _THROTTLED.items() if flags >> bit & 1]
    said += [f"{name} since it was started" for bit, name in _THROTTLED.items() if flags >> bit + 16 & 1]
    return ", ".join(said) or "never"


def _temperatures(root: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        _add(found, read(zone / "type"), read(zone / "temp"))
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = read(chip / "name")
        if name in _PROCESSORS:
            _add(found, name, read(chip / "temp1_input"))
    return found


def _add(found: dict[str, float], name: str | None, thousandths: str | None) -> None:
    """Sensors that are switched off cannot be read, or say less than is cold outside."""
    if name is None or thousandths is None or not re.fullmatch(r"-?\d+", thousandths):
        return
    if -50_000 < int(thousandths) < 200_000:
        number = sum(known == name or known.startswith(f"{name} ") for known in found) + 1
        found[name if number == 1 else f"{name} {number}"] = int(thousandths) / 1000


def _numbers(paths: Iterable[Path]) -> list[int]:
    texts = (read(path) for path in paths)
    return [int(text) for text in texts if text is not None and text.isdigit()]
