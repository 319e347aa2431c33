"""More threads than processors, kept from running at any moment: the logits of one thread, to the bit."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npqwen.model import Model, load

IDS = np.random.default_rng(3).integers(0, 4096, 700)
THREADS = 7


def all_logits(model: Model) -> np.ndarray:
    """Of a long prompt, of passes of a few tokens, and of decoding."""
    cache = model.new_cache()
    rows, at = [], 0
    for count in [512, 33, 5, 4, 3, 2, *[1] * 24]:
        rows.append(model.forward(IDS[at : at + count], cache, all_logits=True))
        at += count
    return np.concatenate(rows)


@contextmanager
def disturbance() -> Iterator[None]:
    """On Linux, move the team's threads from processor to processor at random."""
    done, rng = threading.Event(), np.random.default_rng(0)

    def disturb() -> None:
        cpus = sorted(os.sched_getaffinity(0))
        while not done.wait(0.002):
            for thread in threading.enumerate():
                if thread.name.startswith("npqwen-") and thread.native_id is not None and thread.is_alive():
                    allowed = {int(rng.choice(cpus))} if rng.random() < 0.7 else set(cpus)
                    try:
                        os.sched_setaffinity(thread.native_id, allowed)
                    except ProcessLookupError:
                        continue

    thread = threading.Thread(target=disturb)
    if sys.platform == "linux":
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


@pytest.mark.parametrize("kv", ["int8", "f16"])
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_logits_beside_disturbances(tiny: Callable[[int], Path], request: Any, kind: str, kv: Any) -> None:
    path = tiny(4) if kind == "dense" else request.getfixturevalue("tiny_moe")
    with load(path, threads=1, kv=kv) as model:
        expected = all_logits(model)
    with load(path, threads=THREADS, kv=kv) as model, disturbance():
        for _ in range(3):
            np.testing.assert_array_equal(all_logits(model), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_ctrl_c_beside_disturbances(tiny: Callable[[int], Path]) -> None:
    """Again and again, at another moment each time; what is computed afterwards has the logits of one thread."""
    import _thread

    with load(tiny(4), threads=1) as model:
        expected = model.logits(IDS[:64])
    with load(tiny(4), threads=THREADS) as model, disturbance():
        interrupted = 0
        for turn in range(12):
            timer = threading.Timer(0.004 * turn, _thread.interrupt_main)
            try:
                timer.start()
                while timer.is_alive():
                    model.prefill(IDS, model.new_cache())
                timer.join()
                raise KeyboardInterrupt  # it came between passes
            except KeyboardInterrupt:
                interrupted += 1
            np.testing.assert_array_equal(model.logits(IDS[:64]), expected)
        assert interrupted == 12
