"""A short run of tests/bench/soak.py: clients of which a third vanish, change their mind or send garbage."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "bench" / "soak.py"


@pytest.mark.skipif(sys.platform == "win32", reason="a server cannot be asked to end there")
def test_answers_are_right_and_nothing_is_left_behind_under_load(tiny: Callable[[int], Path]) -> None:
    command = [sys.executable, str(SOAK), str(tiny(4)), "--clients", "12", "--minutes", "0.08", "--requests", "20"]
    run = subprocess.run([*command, "--threads", "2"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "| finished answers |" in run.stdout
    assert "| answers compared after kill -9 | 10 |" in run.stdout
