"""The team of threads: asleep between calls, more of them than processors, interrupts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit

from npqwen.engine.team import Team
from npqwen.errors import OutOfMemoryError
from npqwen.kernels.pieces import claim
from npqwen.model import load

CORES = os.cpu_count() or 1


@njit(nogil=True)
def count_pieces(team: Any, member: int, rounds: int, counts: Any, wrong: Any) -> None:
    """Every round shares 100 pieces of work in one step, and checks in the next that all of them are finished."""
    for turn in range(rounds):
        while claim(team, 100) < 100:
            counts[member] += 1
        while claim(team, 1) == 0:
            if counts.sum() != 100 * (turn + 1):
                wrong[member] += 1


@pytest.mark.parametrize("on_caller", [False, True])
@pytest.mark.parametrize("threads", [1, CORES, 4 * CORES, 64])
def test_more_threads_than_processors_finish(threads: int, on_caller: bool) -> None:
    """A waiting thread yields its processor to a working one."""
    counts, wrong = np.zeros((2, threads), np.int64)
    team = Team(threads)
    try:
        for again in range(3):
            team.run(count_pieces, 20, counts, wrong, on_caller=on_caller)
            assert (int(counts.sum()), int(wrong.sum())) == (2000, 0), again
            counts[:] = 0
    finally:
        team.close()


@pytest.fixture
def spinning() -> Iterator[Callable[[], None]]:
    """Start other programs that keep every processor busy."""
    others: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        others.extend(subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES))

    yield start
    for other in others:
        other.kill()
        other.wait()


def test_a_model_beside_busy_programs(tiny: Callable[[int], Path], spinning: Callable[[], None]) -> None:
    """Four threads per processor, and other programs on every processor: slower, with equal logits."""
    ids = np.arange(40) % 100
    with load(tiny(4), threads=1) as model:
        expected = model.logits(ids)
    with load(tiny(4), threads=4 * CORES) as model:
        spinning()
        cache = model.new_cache()
        rows = [model.forward(ids[:30], cache, all_logits=True)]
        rows += [model.forward([i], cache) for i in ids[30:]]
        np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_an_idle_model_uses_no_processor_time(tiny: Callable[[int], Path]) -> None:
    with load(tiny(4), threads=4) as model:
        model.logits(np.arange(8))
        before, start = time.process_time(), time.perf_counter()
        time.sleep(0.5)
        used, passed = time.process_time() - before, time.perf_counter() - start
        assert used < 0.02 * passed
        assert model.logits(np.arange(8)).shape[0] == 8  # The threads are still there.


def test_the_threads_end_with_the_team() -> None:
    before = set(threading.enumerate())
    team = Team(5)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 5
    team.close()
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)


def test_threads_that_the_system_refuses_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before, start = set(threading.enumerate()), threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if len(set(threading.enumerate()) - before) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(OutOfMemoryError, match=r"the system refused thread 3 of 5; use fewer \(--threads\)"):
        Team(5)
    for worker in set(threading.enumerate()) - before:
        worker.join(timeout=60)
    assert set(threading.enumerate()) <= before


def test_ctrl_c_while_the_calling_thread_computes() -> None:
    """It is delivered when the function returns, and the team works as before."""
    team = Team(2)
    counts, wrong = np.zeros((2, 2), np.int64)
    interrupts = [KeyboardInterrupt]

    def counted(state: Any, member: int, *args: Any) -> None:
        count_pieces(state, member, *args)
        if member == 0 and interrupts:
            raise interrupts.pop()

    try:
        with pytest.raises(KeyboardInterrupt):
            team.run(counted, 20, counts, wrong, on_caller=True)
        assert (int(counts.sum()), int(wrong.sum())) == (2000, 0)
        counts[:] = 0
        team.run(counted, 20, counts, wrong, on_caller=True)
        assert (int(counts.sum()), int(wrong.sum())) == (2000, 0)
    finally:
        team.close()


class Unlucky:
    """A lock whose first wait is interrupted at the moment it succeeds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._interrupted = False

    def acquire(self, timeout: float = -1) -> bool:
        got = self._lock.acquire(timeout=timeout)
        if not self._interrupted:
            self._interrupted = True
            raise KeyboardInterrupt
        return got

    def release(self) -> None:
        self._lock.release()


def test_an_interrupt_the_moment_the_work_is_done_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team(2)
    ends: list[BaseException] = []

    def run() -> None:
        try:
            team.run(lambda state, member: time.sleep(0.2))
        except BaseException as end:
            ends.append(end)

    with monkeypatch.context() as patch:
        patch.setattr("npqwen.engine.team._held", Unlucky)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(30)
    assert [type(end) for end in ends] == [KeyboardInterrupt]
    counts, wrong = np.zeros((2, 2), np.int64)
    team.run(count_pieces, 20, counts, wrong)
    assert (int(counts.sum()), int(wrong.sum())) == (2000, 0)
    team.close()
