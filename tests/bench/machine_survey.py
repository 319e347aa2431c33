#!/usr/bin/env python3
"""`npqwen bench --report` with the machine's sensors: temperatures, clocks and throttling before, during and after.

    python tests/bench/machine_survey.py MODEL [FILE] [--prefill 512 --decode 64 --depth 0 --repeat 5 --threads N]

For small boards, whose numbers mean little without these; written for the Raspberry Pi 5 (docs/raspberry-pi.md).
MODEL is what `npqwen bench` takes. FILE (npqwen-bench.md) becomes Markdown, or JSON if it ends in .json. It holds
nothing private: no host name, user name or path.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interleave import counts
from sensors import Sensors, read_sensors, throttling, vcgencmd

import npqwen
from npqwen.errors import NpqwenError
from npqwen.reports import bench, machine_report


class Log:
    """Readings of the sensors before, during and after the runs."""

    def __init__(self, root: Path = Path("/")) -> None:
        """root: where /proc and /sys are."""
        self.root = root
        self.readings = [read_sensors(root, vcgencmd)]

    def add(self) -> None:
        """Read the sensors between two runs."""
        self.readings.append(read_sensors(self.root))

    def end(self) -> None:
        """Read the sensors after the last run."""
        self.readings.append(read_sensors(self.root, vcgencmd))

    def as_dict(self) -> dict[str, Any]:
        """The readings for JSON: degrees Celsius, MHz, None for what the system does not say."""
        before, after = self.readings[0], self.readings[-1]
        slowdowns = None
        if before.slowdowns is not None and after.slowdowns is not None:
            slowdowns = after.slowdowns - before.slowdowns
        return {
            "temperatures": {
                name: {
                    "before": degrees,
                    "highest": max(r.temperatures.get(name, degrees) for r in self.readings),
                    "after": after.temperatures.get(name),
                }
                for name, degrees in before.temperatures.items()
            },
            "clocks": {
                "allowed": max(before.fastest, default=None),
                "before": _range(before),
                "lowest": min((min(r.clocks) for r in self.readings if r.clocks), default=None),
                "after": _range(after),
                "governor": before.governor,
            },
            "throttled": {
                "before": None if before.throttled is None else hex(before.throttled),
                "after": None if after.throttled is None else hex(after.throttled),
                "slowdowns": slowdowns,
            },
        }


def sensor_rows(s: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the report's rows for `Log.as_dict`."""
    hottest = sorted(s["temperatures"].items(), key=lambda item: -item[1]["highest"])[:4]
    temperatures = [f"{name} {t['before']:.0f} before, {t['highest']:.0f} at most" for name, t in hottest]
    clocks, throttled = s["clocks"], s["throttled"]
    clock = ""
    if clocks["lowest"] is not None:
        clock = f"{clocks['after']} MHz after, {clocks['lowest']} at least"
        clock += f", {clocks['allowed']} allowed" if clocks["allowed"] is not None else ""
        clock += f", governor {clocks['governor']}" if clocks["governor"] else ""
    slowed = []
    if throttled["after"] is not None:
        before = f" (before: {throttled['before']})" if throttled["before"] != throttled["after"] else ""
        slowed.append(f"{throttled['after']}: {throttling(int(throttled['after'], 16))}{before}")
    if throttled["slowdowns"] is not None:
        slowed.append(f"{throttled['slowdowns']} times during the runs")
    return [
        ("temperature, °C", "; ".join(temperatures) or "unknown"),
        ("clock", clock or "unknown"),
        ("throttled", "; ".join(slowed) or "unknown"),
    ]


def _range(sensors: Sensors) -> str | None:
    if not sensors.clocks:
        return None
    low, high = min(sensors.clocks), max(sensors.clocks)
    return str(low) if low == high else f"{low}-{high}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a hub id, a checkpoint or a converted directory")
    parser.add_argument("file", type=Path, nargs="?", default=Path("npqwen-bench.md"))
    parser.add_argument("--bits", type=int, help="bits a weight, if MODEL is not converted yet")
    parser.add_argument("--prefill", type=counts, default=[512])
    parser.add_argument("--decode", type=counts, default=[64])
    parser.add_argument("--depth", type=counts, default=[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    try:
        path = machine_report.check_path(options.file)
        with npqwen.load(options.model, bits=options.bits, threads=options.threads) as model:
            log = Log()

            def progress(done: int, total: int) -> None:
                log.add()

            lengths = (options.prefill, options.decode, options.depth)
            speed = bench.benchmark(model, *lengths, options.repeat, progress)
            log.end()
            facts = {**machine_report.collect(model, speed), "sensors": log.as_dict()}
            machine_report.write(facts, path, sensor_rows(facts["sensors"]))
    except NpqwenError as error:
        sys.exit(f"machine_survey.py: error: {error}")
    print(path.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
