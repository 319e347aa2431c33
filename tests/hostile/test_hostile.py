"""2,000 hostile cases of the command line: none may crash, hang, grow or end with anything but one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("cases run in forked children", allow_module_level=True)

from hostile.runner import judge

RUN = Path(__file__).with_name("run.py")


def test_two_thousand_hostile_cases() -> None:
    """In a process of their own, as only one without threads can be forked; failures name their command."""
    done = subprocess.run([sys.executable, str(RUN), "--cases", "2000"], capture_output=True, text=True, timeout=1800)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].split()[:3] == ["all", "2000", "0"]


@pytest.mark.parametrize(
    ("status", "stderr", "problem"),
    [
        (0, "", ""),
        (0, "a notice\n", ""),
        (2, "a notice\nnpqwen: error: x is y; do z\n", ""),
        (1, "npqwen: error: x\n", "its exit status is 1"),
        (-11, "", "its exit status is -11"),
        (2, "", "with 0 lines of errors"),
        (0, "npqwen: error: x\n", "with 1 lines of errors"),
        (2, "npqwen: error: x\nnpqwen: error: y\n", "with 2 lines of errors"),
        (2, f"npqwen: error: {'x' * 1001}\n", "a line of 1,016 characters"),
        (2, "npqwen: error: x\nmore\n", "text after the error"),
        (0, "Traceback (most recent call last):\n  File 1\nKeyError: 1\n", "stderr has 'Traceback"),
        (0, "/x.py:1: RuntimeWarning: overflow\n", "RuntimeWarning"),
        (0, "\nthread '<unnamed>' (1) panicked at x.rs:1:1:\n", "panicked"),
        (0, "a \x07 bell\n", "control characters"),
    ],
)
def test_what_is_judged_to_be_wrong(status: int, stderr: str, problem: str) -> None:
    found = judge(status, stderr)
    assert problem in found
    assert bool(problem) == bool(found)


def test_a_case_that_dies_hangs_or_grows_is_found_and_the_others_run(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "hostile.broken", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == len(found) == 5
    expected = {
        "raises": "KeyError: 'x'",
        "dies": "it was killed by SIGSEGV",
        "burns": "it was killed for its CPU time",
        "grows": "it grew by ",
        "exits": "its exit status is 3",
    }
    assert set(found) == set(expected)
    for category, words in expected.items():
        assert words in found[category]
