"""Temperatures, clocks and throttling of the processor, where Linux reports them."""

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
"""Bits of a Raspberry Pi's `vcgencmd get_throttled`: now; 16 bits higher, since it was started."""
_PROCESSORS = ("coretemp", "k10temp", "zenpower")
"""Drivers of x86 processors' own sensors, which are not thermal zones."""


@dataclass(frozen=True)
class Sensors:
    """One reading of all sensors."""

    temperatures: dict[str, float]
    """Degrees Celsius by sensor name."""
    clocks: list[int]
    """MHz of every CPU now; empty if unknown."""
    fastest: list[int]
    """Highest MHz that the system allows each CPU."""
    governor: str | None
    throttled: int | None
    """A Raspberry Pi's throttling flags."""
    slowdowns: int | None
    """Number of thermal slowdowns of an x86 processor since it was started, all cores together."""


def read_sensors(root: Path = Path("/"), get_throttled: Callable[[], str] | None = None) -> Sensors:
    """Read the files below root/sys.

    get_throttled: asks a Raspberry Pi's firmware (`vcgencmd`), which takes milliseconds, the rest far less. None: skip.
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
    """Output of a Raspberry Pi's `vcgencmd get_throttled`; empty on other machines."""
    try:
        done = subprocess.run(
            ["vcgencmd", "get_throttled"], capture_output=True, encoding="utf-8", errors="replace", timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def throttling(flags: int) -> str:
    """A Raspberry Pi's flags in words: "under-voltage now, throttled since it was started"."""
    words = [f"{name} now" for bit, name in _THROTTLED.items() if flags >> bit & 1]
    words += [f"{name} since it was started" for bit, name in _THROTTLED.items() if flags >> bit + 16 & 1]
    return ", ".join(words) or "never"


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
    """Add a reading, unless the sensor is off: then it cannot be read, or reads below -50 °C."""
    if name is None or thousandths is None or not re.fullmatch(r"-?\d+", thousandths):
        return
    if -50_000 < int(thousandths) < 200_000:
        number = sum(known == name or known.startswith(f"{name} ") for known in found) + 1
        found[name if number == 1 else f"{name} {number}"] = int(thousandths) / 1000


def _numbers(paths: Iterable[Path]) -> list[int]:
    texts = (read(path) for path in paths)
    return [int(text) for text in texts if text is not None and text.isdigit()]
