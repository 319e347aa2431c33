"""Warnings of too many threads and of other programs, on systems made of files and with a real busy process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_system import tree

import npqwen
from npqwen.hardware import contention
from npqwen.hardware.contention import Contention, too_many_threads

linux = pytest.mark.skipif(sys.platform != "linux", reason="knows the CPUs of others on Linux only")
HZ = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def stat(root: Path, *cpus: tuple[float, float, float]) -> Path:
    """/proc/stat of CPUs with (user, nice, system) seconds."""
    lines = ["cpu  1 2 3 4 0 0 0 0 0 0"]
    for number, (user, nice, system) in enumerate(cpus):
        lines.append(f"cpu{number} {user * HZ:.0f} {nice * HZ:.0f} {system * HZ:.0f} 500 70 0 9 0 0 0")
    return tree(root, {"proc/stat": "\n".join([*lines, "intr 12 0", "ctxt 5"])})


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """This process may use CPUs 0 and 1, at time 0, and uses none; two_cpus(seconds) moves the clock."""
    now = [0.0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "times", lambda: os.times_result((1.0, 1.0, 0.0, 0.0, now[0])))
    monkeypatch.setattr(os, "getloadavg", lambda: (1.2, 1.0, 1.0))
    monkeypatch.setattr(os, "nice", lambda increment: 0)
    # Not time.monotonic itself: other threads, such as a server's, would wait for ever.
    monkeypatch.setattr("npqwen.hardware.contention.time", SimpleNamespace(monotonic=lambda: now[0]))

    def pass_to(seconds: float) -> None:
        now[0] = seconds

    return pass_to


@linux
@pytest.mark.parametrize(
    ("user", "nice", "system", "threads", "hint"),
    [
        (2.0, 0.0, 0.0, 2, "other programs keep 1.0 of 2 CPUs busy, which delays all 2 threads: --threads 1 may"),
        (1.2, 0.0, 0.4, 2, "other programs keep 0.8 of 2 CPUs busy"),
        (0.5, 0.0, 0.1, 2, None),  # a browser
        (0.1, 1.9, 0.0, 2, None),  # a program that gives way
        (2.0, 0.0, 0.0, 1, None),  # one thread has a CPU of its own
    ],
)
def test_a_busy_program(
    user: float, nice: float, system: float, threads: int, hint: str | None, tmp_path: Path,
    two_cpus: Callable[[float], None],
) -> None:  # fmt: skip
    """In two seconds. CPU 2 is busy, too, but not ours."""
    observed = Contention(stat(tmp_path, (10, 10, 10), (20, 20, 20), (0, 0, 0)))
    two_cpus(2.0)
    stat(tmp_path, (10, 10 + nice, 10), (20 + user, 20, 20 + system), (2, 0, 0))
    found = observed.hint(threads)
    assert (found is None) == (hint is None), found
    assert hint is None or (found or "").startswith(hint)


@linux
def test_no_alarm_without_evidence(
    tmp_path: Path, two_cpus: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Contention(stat(tmp_path, (0, 0, 0), (0, 0, 0)))
    stat(tmp_path, (0, 0, 0), (2, 0, 0))
    two_cpus(0.2)
    assert observed.busy() is None  # too short
    two_cpus(2.0)
    assert observed.busy() == 1.0
    monkeypatch.setattr(os, "times", lambda: os.times_result((2.5, 1.5, 0.0, 0.0, 0.0)))
    assert observed.busy() == 0.0  # it was this process


@linux
def test_the_time_of_a_niced_process_is_counted_apart(
    tmp_path: Path, two_cpus: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "nice", lambda increment: 5)
    observed = Contention(stat(tmp_path, (0, 0, 0), (0, 0, 0)))
    monkeypatch.setattr(os, "times", lambda: os.times_result((4.0, 1.5, 0.0, 0.0, 0.0)))  # 3 s of user's, 0.5 of system
    stat(tmp_path, (0, 3, 0.5), (2, 0, 0))
    two_cpus(2.0)
    assert observed.busy() == 1.0


@linux
def test_a_program_that_has_just_begun_is_no_reason(
    tmp_path: Path, two_cpus: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Contention(stat(tmp_path, (0, 0, 0), (0, 0, 0)))
    stat(tmp_path, (0, 0, 0), (2, 0, 0))
    two_cpus(2.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.3, 0.1, 0.1))
    assert observed.hint(2) is None
    two_cpus(2.0)
    stat(tmp_path, (2, 0, 0), (2, 0, 0))
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 1.0, 1.0))
    found = observed.hint(2)
    assert found is not None
    assert "--threads 1" in found


@linux
def test_a_short_command_is_no_reason(
    tmp_path: Path, two_cpus: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Contention(stat(tmp_path, (0, 0, 0), (0, 0, 0)))
    for seconds, told in ((9, False), (11, True)):
        monkeypatch.setattr(os, "times", lambda seconds=seconds: os.times_result((1.0 + seconds, 1.0, 0, 0, 0)))
        stat(tmp_path, (seconds, 0, 0), (seconds, 0, 0))
        two_cpus(seconds)
        assert (observed.hint(2, 10) is not None) == told


@linux
@pytest.mark.parametrize(("least", "told"), [(0, 1), (1000, 0)])
def test_a_command_tells_once_when_it_ends(
    tiny: Callable[[int], Path],
    tmp_path: Path,
    run: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    least: float,
    told: int,
) -> None:
    (tmp_path / "text").write_text("river (noun): a large natural stream of water. ", encoding="utf-8")
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    monkeypatch.setattr(Contention, "busy", lambda self: len(os.sched_getaffinity(0)) - 1.0)
    monkeypatch.setattr("npqwen.commands.loading._LONG", least)
    _, err = run("eval", tiny(4), tmp_path / "text", "--against", tiny(8), "--threads", 2)
    assert err.count("other programs keep") == told
    assert not told or err.splitlines()[-1].startswith("other programs keep")


@linux
def test_a_system_without_these_files(tmp_path: Path, two_cpus: Callable[[float], None]) -> None:
    observed = Contention(tmp_path)
    two_cpus(2.0)
    assert observed.busy() is None
    assert observed.hint(2) is None


@linux
def test_another_process_is_seen_and_this_one_is_not() -> None:
    """On the real system, on one CPU: another process's work counts, ours does not."""
    if os.nice(0) > 0:
        pytest.skip("its processes give way to others")
    allowed = os.sched_getaffinity(0)
    cpu = min(allowed)
    code = "import time\nend = time.process_time() + 0.4\nprint(flush=True)\nwhile time.process_time() < end: pass"
    os.sched_setaffinity(0, {cpu})
    try:
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.read(1)
            observed = Contention()
            start = time.monotonic()
            other.wait(60)
            busy = observed.busy()
            seconds = time.monotonic() - start
    finally:
        os.sched_setaffinity(0, allowed)
    assert busy is not None
    assert busy * seconds > 0.3


def test_more_threads_than_cpus(monkeypatch: pytest.MonkeyPatch, tiny: Callable[[int], Path]) -> None:
    monkeypatch.setattr(contention, "usable_cpus", lambda: 2)
    assert too_many_threads(2) is None
    assert too_many_threads(400) == "400 threads are slower than 2: this process may use only 2 CPUs"
    with pytest.warns(npqwen.ThreadsWarning, match="3 threads are slower than 2"):
        npqwen.load(tiny(4), threads=3).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        npqwen.load(tiny(4), threads=2).close()
        npqwen.load(tiny(4)).close()
    monkeypatch.setattr(contention, "usable_cpus", lambda: 1)
    assert too_many_threads(2) == "2 threads are slower than 1: this process may use only 1 CPU"
