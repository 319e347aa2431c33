"""`npqwen bench --report`: what it tells, read from a Raspberry Pi made of files, and what it keeps to itself."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_system import raspberry_pi, tree

from npqwen import OutputError
from npqwen.commands import cli
from npqwen.hardware import sensors
from npqwen.hardware.sensors import read_sensors, throttling
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


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
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


def measured(tiny: Callable[[int], Path], root: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The report of a Pi that grows hot between the runs, and is cooler after them."""
    states = iter([(70.0, 2400), (84.4, 1500), (80.1, 1800), (75.0, 2200)])
    flags = iter(["throttled=0x0", "throttled=0x80000"])
    monkeypatch.setattr(machine_report, "vcgencmd", lambda: next(flags))
    monkeypatch.setattr(machine_report.platform, "release", lambda: "6.12.34+rpt-rpi-2712")

    with load(tiny(4), threads=2) as model:
        log = machine_report.Log(raspberry_pi(root, 48.2))

        def progress(done: int, total: int) -> None:
            raspberry_pi(root, *next(states))
            log.add()

        speed = benchmark(model, [4], [2], [0], 1, progress)
        raspberry_pi(root, 66.0, 2400)
        log.end()
        return machine_report.collect(model, speed, log, root)


@linux
def test_report_of_a_raspberry_pi(tiny: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    text = machine_report.markdown(facts)
    rows = dict(re.findall(r"^\| ([\w, °]+) \| (.*) \|$", text, re.M))
    assert rows["temperature, °C"] == "cpu-thermal 48 before, 84 at most"
    assert rows["clock"] == "2400 MHz after, 1500 at least, 2400 allowed, governor ondemand"
    assert rows["throttled"] == "0x80000: soft temperature limit since it was started (before: 0x0)"
    assert rows["system"] == "Debian GNU/Linux 12 (bookworm), kernel 6.12.34+rpt-rpi-2712"
    assert rows["memory"].startswith("8.4 GB, reads ")
    assert f"Python {platform.python_version()}, numba " in rows["versions"]
    assert "c0ffee" not in text + json.dumps(facts)  # the board's serial number
    assert re.search(r"^\| prefill 4 \| 0 \| \d+\.\d \|", text, re.M)
    assert len(text) < 4000


@pytest.mark.parametrize("name", ["result.json", "result.md", None])
def test_the_command_writes_a_report_with_nothing_private(
    name: str | None,
    tiny: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "secret-of-jane" / "my-model"
    shutil.copytree(tiny(4), model)
    monkeypatch.chdir(tmp_path)
    args = ["bench", str(model), "--prefill", "4", "--decode", "2", "--repeat", "1", "--threads", "2", "--report"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*args, *([] if name is None else [name])])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0
    assert "| prefill 4 | 0 |" in out
    place = tmp_path / (name or "npqwen-bench.md")
    assert err == f"the report is in {place.name}\n"
    text = place.read_text(encoding="utf-8")
    if name == "result.json":
        assert json.loads(text)["measures"][1]["tokens"] == 2
    else:
        assert text.startswith("npqwen ")
    private = [platform.node(), "secret-of-jane", "my-model", str(Path.home()), str(tmp_path), os.sep + "tmp"]
    for secret in [*private, getpass.getuser()]:
        # Short names such as `vm` or `root` may be part of another word.
        assert not secret or not re.search(rf"(?<![\w-]){re.escape(secret)}(?![\w-])", text), secret


@pytest.mark.parametrize(
    ("place", "problem"),
    [("nowhere/result.md", "nowhere is not there"), (".", "is a directory"), ("file/result.md", "file is not there")],
)
def test_a_place_that_cannot_be_written_is_refused_before_measuring(
    place: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:  # There is no such model, but that comes later.
        cli.main(["bench", str(tmp_path / "model"), "--report", place])
    assert stopped.value.code == 2
    assert re.fullmatch(rf"npqwen: error: {problem}.*\n|npqwen: error: \S* ?{problem}.*\n", capsys.readouterr().err)


def test_places_that_this_user_may_not_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="cannot be written to; name another place"):
        machine_report.check_place(tmp_path / ("x" * 300 + ".md"))
    (tmp_path / "result.md").touch()
    for refused in ("result.md", tmp_path.name):  # a file, and a folder for a new one
        monkeypatch.setattr(os, "access", lambda path, mode, refused=refused: Path(path).name != refused)
        with pytest.raises(OutputError, match="cannot be written to; name another place"):
            machine_report.check_place(tmp_path / ("result.md" if refused == "result.md" else "new.md"))
    monkeypatch.undo()

    def closed(path: Path, **options: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", closed)
    with pytest.raises(OutputError, match="cannot be written to; name another place"):
        machine_report.check_place(tmp_path / "result.md")


@linux
def test_a_report_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine_report.check_place(Path("~/result.md")) == tmp_path / "result.md"


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        machine_report.write({"measures": []}, tmp_path / "result.json")
