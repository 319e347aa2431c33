"""The survey of a machine's sensors, read from systems made of files."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine_survey
import pytest
import sensors
from fake_system import raspberry_pi, tree
from sensors import read_sensors, throttling

from npqwen.model import load
from npqwen.reports import machine_report
from npqwen.reports.bench import benchmark

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's files")


def test_sensors_of_a_raspberry_pi(tmp_path: Path) -> None:
    found = read_sensors(raspberry_pi(tmp_path, 61.7, 1500), lambda: "throttled=0x50005\n")
    assert found.temperatures == {"cpu-thermal": 61.7}
    assert (found.clocks, found.fastest, found.governor) == ([1500] * 4, [2400] * 4, "ondemand")
    assert found.throttled == 0x50005
    assert found.slowdowns is None


def test_sensors_of_a_laptop(tmp_path: Path) -> None:
    files = {
        "sys/class/thermal/thermal_zone0/type": "acpitz",
        "sys/class/thermal/thermal_zone0/temp": "27800",
        "sys/class/thermal/thermal_zone1/type": "acpitz",
        "sys/class/thermal/thermal_zone1/temp": "31000",
        "sys/class/thermal/thermal_zone2/type": "off",
        "sys/class/thermal/thermal_zone2/temp": "-274000",
        "sys/class/thermal/thermal_zone3/type": "silent",
        "sys/class/hwmon/hwmon0/name": "nvme",
        "sys/class/hwmon/hwmon0/temp1_input": "40000",
        "sys/class/hwmon/hwmon1/name": "k10temp",
        "sys/class/hwmon/hwmon1/temp1_input": "71250",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3",
        "sys/devices/system/cpu/cpu10/thermal_throttle/core_throttle_count": "4",
        "sys/devices/system/cpu/cpufreq/nothing": "1",
    }
    found = read_sensors(tree(tmp_path, files), lambda: "")
    assert found.temperatures == {"acpitz": 27.8, "acpitz 2": 31.0, "k10temp": 71.25}
    assert (found.clocks, found.fastest, found.governor, found.throttled) == ([], [], None, None)
    assert found.slowdowns == 7


def test_a_system_without_sensors(tmp_path: Path) -> None:
    found = read_sensors(tmp_path)
    assert (found.temperatures, found.clocks, found.throttled, found.slowdowns) == ({}, [], None, None)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (0, "never"),
        (
            0x50005,
            "under-voltage now, throttled now, under-voltage since it was started, throttled since it was started",
        ),
        (0xA0000, "clock capped since it was started, soft temperature limit since it was started"),
    ],
)
def test_throttling_flags(flags: int, text: str) -> None:
    assert throttling(flags) == text


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for the command")
def test_vcgencmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sensors.vcgencmd() == ""
    command = tmp_path / "vcgencmd"
    command.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x80000\n', encoding="utf-8")
    command.chmod(0o755)
    assert read_sensors(tmp_path, sensors.vcgencmd).throttled == 0x80000


def measured(tiny: Callable[[int], Path], root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The survey of a Pi that grows hot between the runs, and is cooler after them."""
    states = iter([(70.0, 2400), (84.4, 1500), (80.1, 1800), (75.0, 2200)])
    flags = iter(["throttled=0x0", "throttled=0x80000"])
    monkeypatch.setattr(machine_survey, "vcgencmd", lambda: next(flags))
    monkeypatch.setattr(platform, "release", lambda: "6.12.34+rpt-rpi-2712")

    with load(tiny(4), threads=2) as model:
        log = machine_survey.Log(raspberry_pi(root, 48.2))

        def progress(done: int, total: int) -> None:
            raspberry_pi(root, *next(states))
            log.add()

        speed = benchmark(model, [4], [2], [0], 1, progress)
        raspberry_pi(root, 66.0, 2400)
        log.end()
        return {**machine_report.collect(model, speed, root), "sensors": log.as_dict()}


@linux
def test_survey_of_a_raspberry_pi(tiny: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = measured(tiny, tmp_path, monkeypatch)
    assert facts["sensors"] == {
        "temperatures": {"cpu-thermal": {"before": 48.2, "highest": 84.4, "after": 66.0}},
        "clocks": {"allowed": 2400, "before": "2400", "lowest": 1500, "after": "2400", "governor": "ondemand"},
        "throttled": {"before": "0x0", "after": "0x80000", "slowdowns": None},
    }
    assert facts["machine"]["processor"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert facts["machine"]["memory"] == 8245280 * 1024
    assert (facts["run"]["peak"], facts["run"]["own"]) == (612000 * 1024, 110000 * 1024)
    assert facts["model"]["layers"] == 4
    assert [m["test"] for m in facts["measures"]] == ["prefill", "decode"]

    text = machine_report.markdown(facts, machine_survey.sensor_rows(facts["sensors"]))
    rows = dict(re.findall(r"^\| ([\w, °]+) \| (.*) \|$", text, re.M))
    assert rows["temperature, °C"] == "cpu-thermal 48 before, 84 at most"
    assert rows["clock"] == "2400 MHz after, 1500 at least, 2400 allowed, governor ondemand"
    assert rows["throttled"] == "0x80000: soft temperature limit since it was started (before: 0x0)"
    assert rows["system"] == "Debian GNU/Linux 12 (bookworm), kernel 6.12.34+rpt-rpi-2712"
    assert rows["memory"].startswith("8.4 GB, reads ")
    assert f"Python {platform.python_version()}, numba " in rows["versions"]
    assert "c0ffee" not in text + json.dumps(facts)  # the board's serial number
    assert re.search(r"^\| prefill 4 \| 0 \| 2 \| \d+\.\d \|", text, re.M)
    assert len(text) < 4000


def test_the_script_prints_what_it_writes(
    tiny: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prefill", "4", "--decode", "2", "--repeat", "1", "--threads", "2"]
    for name in ("survey.md", "survey.json"):
        machine_survey.main([str(tiny(4)), str(tmp_path / name), *arguments])
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert capsys.readouterr().out == text
        if name.endswith("json"):
            assert json.loads(text)["sensors"].keys() == {"temperatures", "clocks", "throttled"}
        else:
            assert re.search(r"^\| throttled \| .+ \|$", text, re.M)
    with pytest.raises(SystemExit, match=r"error: .* is a directory"):
        machine_survey.main([str(tiny(4)), str(tmp_path)])
