"""Cases that fail on purpose, to test the runner: prints the category and the problem of each failure.

python -m hostile.broken SCRATCH
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from hostile.case import Case, Generator, Place
from hostile.runner import Runner, Work

KEPT: list[bytes] = []


def burn() -> None:
    while True:
        pass


def raise_error() -> None:
    raise KeyError("x")


CALLS: dict[str, Callable[[], object]] = {
    "fine": lambda: None,
    "raises": raise_error,
    "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "burns": burn,
    "grows": lambda: KEPT.append(b"x" * 300_000_000),
    "exits": lambda: sys.exit(3),
    "sleeps": lambda: time.sleep(0.01),
}


def generator(call: Callable[[], object]) -> Generator:
    """Makes cases that call this."""

    def generate(random: Random, place: Place) -> Case:
        return Case("on purpose", [], call=call, seconds=0.5)

    return generate


if __name__ == "__main__":
    scratch = Path(sys.argv[1])
    runner = Runner({name: generator(call) for name, call in CALLS.items()}, scratch, scratch)
    report = runner.run([Work(name, 1, number) for number in range(1) for name in CALLS], jobs=2)
    assert report.counts == dict.fromkeys(CALLS, 1)
    for failure in report.failures:
        print(failure.work.category, failure.problem)
