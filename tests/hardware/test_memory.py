"""Memory: how much is used, and refusals before the machine swaps, which say what would fit."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import npqwen.engine.arrays
import npqwen.engine.engine
import npqwen.engine.runner
from npqwen import OutOfMemoryError
from npqwen.commands import cli
from npqwen.engine import kv_cache
from npqwen.engine.budget import RESERVED, Budget
from npqwen.hardware import machine
from npqwen.hardware.machine import HEADROOM
from npqwen.kernels.cache_page import PAGE
from npqwen.model import load
from npqwen.reports.info import inspect


def test_a_cache_that_memory_cannot_hold_is_refused_before_computing(
    tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(tiny(4)) as model:
        cache = model.new_cache()
        monkeypatch.setattr(kv_cache, "available_memory", lambda: 2 * cache.page_bytes + HEADROOM + 5)
        with pytest.raises(OutOfMemoryError, match=f"enough for {2 * PAGE} tokens"):
            model.prefill(np.zeros(2 * PAGE + 1, np.int64), cache)
        assert (cache.length, cache.nbytes) == (0, 0)
        model.prefill(np.zeros(2 * PAGE, np.int64), cache)
        monkeypatch.setattr(kv_cache, "available_memory", lambda: 0)
        with pytest.raises(OutOfMemoryError, match=f"enough for {2 * PAGE} tokens"):
            model.forward([1], cache)
        cache.truncate(PAGE)
        model.forward([1], cache)  # What is there already costs nothing.


def test_a_failed_allocation_is_an_error_of_ours(tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `ulimit -v` the allocation fails, whatever the system says is available."""
    with load(tiny(4)) as model:
        cache = model.new_cache()
        model.prefill(np.zeros(PAGE, np.int64), cache)

        def refuse(*args: object) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        monkeypatch.setattr("mmap.mmap", refuse)
        with pytest.raises(OutOfMemoryError, match=f"enough for {PAGE} tokens"):
            cache.reserve(1)
        assert cache.length == PAGE


def test_logits_that_memory_cannot_hold_are_refused(
    tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of 2,000 positions are 33 MB here, and 300 times as much with Qwen3's vocabulary."""
    with load(tiny(4)) as model:
        ids = np.zeros(2000, np.int64)
        size = 4 * 4128 * (2000 + model.chunk)  # a piece's are computed in a place of their own
        monkeypatch.setattr(npqwen.engine.arrays, "available_memory", lambda: size - 1 + HEADROOM)
        with pytest.raises(OutOfMemoryError, match=r"logits of 2000 tokens need 0\.04 GB, .* fewer tokens at a time"):
            model.logits(ids)
        assert model.prefill(ids, model.new_cache()).shape == (4128,)
        monkeypatch.setattr(npqwen.engine.arrays, "available_memory", lambda: size + HEADROOM)
        assert model.logits(ids).shape == (2000, 4128)

        def refuse(*args: object) -> None:
            raise MemoryError

        monkeypatch.setattr(np, "empty", refuse)
        with pytest.raises(OutOfMemoryError, match="logits of 2000 tokens"):
            model.logits(ids)


def test_weights_larger_than_memory_are_announced(
    tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 1_000_000)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(tiny(4)), "A", "--max-tokens", "1"])
    assert stopped.value.code == 0
    assert "1.0 MB of memory is available" in capsys.readouterr().err


def test_a_context_that_memory_cannot_hold_is_refused_when_loading(
    tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is computed or compiled first. Without a requested context, only what is used counts."""
    with load(tiny(4)) as model:
        page, working = model.new_cache().page_bytes, model._runner.nbytes
    monkeypatch.setattr(npqwen.engine.engine, "available_memory", lambda: working + 3 * page + RESERVED)
    with monkeypatch.context() as patch:
        patch.setattr(npqwen.engine.runner, "compile_kernel", None)
        with pytest.raises(OutOfMemoryError, match=rf"context of {3 * PAGE + 1} tokens .* enough for {3 * PAGE} tok"):
            load(tiny(4), context=3 * PAGE + 1)
    load(tiny(4), context=3 * PAGE).close()
    load(tiny(4)).close()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(tiny(4)), "A", "--context", "2048"])
    assert stopped.value.code == 2
    assert f"enough for {3 * PAGE} tokens; choose a smaller context" in capsys.readouterr().err
    monkeypatch.setattr(npqwen.engine.engine, "available_memory", lambda: working + RESERVED)
    with pytest.raises(OutOfMemoryError, match="besides its weights"):
        load(tiny(4))


@pytest.mark.parametrize(
    ("available", "fitting", "possible"),
    [
        (None, 2048, 2048),
        (10_000, 2048, 2048),
        (1000 + 50 + 2 * 70, 512, 2048),
        (1050, 0, 2048),
        (50 + 71, 0, 256),
        (0, 0, 0),
    ],
)
def test_the_context_that_fits(available: int | None, fitting: int, possible: int) -> None:
    budget = Budget(1000, 50, 70, None if available is None else available + RESERVED)
    assert (budget.fitting(2048), budget.possible(2048)) == (fitting, possible)
    assert budget.needed(257) == 1000 + 50 + 2 * 70


def test_info_says_what_fits(
    tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = inspect(tiny(4))
    page = whole.cache // 8
    beside = whole.working + RESERVED

    def available(count: int) -> str:
        monkeypatch.setattr(machine, "available_memory", lambda: count)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["info", str(tiny(4))])
        assert stopped.value.code == 0
        (line,) = re.findall(r"^available +.*? [kM]B, (.*)$", capsys.readouterr().out, re.M)
        return str(line)

    assert available(whole.needed + RESERVED) == "enough"
    assert available(whole.needed + RESERVED - 1) == "enough for 1792 tokens of context"
    assert available(whole.weights + beside + page - 1).startswith("too little for weights and cache: it runs with ")
    assert available(beside) == "too little to run it"


@pytest.mark.skipif(sys.platform != "linux", reason="control groups and limits of addresses are Linux's")
def test_the_measurement_within_a_limit(tiny: Callable[[int], Path]) -> None:
    """tests/bench/memory_limit.py prints a row."""
    script = Path(__file__).parents[1] / "bench" / "memory_limit.py"
    options = ["--cache", os.environ["NPQWEN_CACHE"], "--prompt", "8", "--tokens", "2", "--limit", "4"]
    done = subprocess.run([sys.executable, script, tiny(4), *options], capture_output=True, text=True, check=True)
    row = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"\| tiny-qwen3-4 \| 4\.29.* \|( \d+\.\d+ \|){2}( 0\.\d\d \|){2} .* \|", row), row


def test_available_memory_is_in_bytes() -> None:
    found = machine.available_memory()
    assert found is None or 1e7 < found < 1e14


MEMORY = """
import sys
from pathlib import Path
import numpy as np
import npqwen.model, npqwen.tokenizer
def resident(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))
before = resident("RssAnon")
model = npqwen.model.load(Path(sys.argv[1]), threads=2)
model.logits(range(1))
once = resident("RssAnon")
cache = model.new_cache()
model.prefill(np.arange(300), cache)
for i in range(20):
    model.forward([i], cache)
used = resident("RssAnon")
print(once - before, used - before, cache.nbytes, resident("RssFile"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_stay_in_the_page_cache(large: Path) -> None:
    """Loading copies no weights; the buffers of a forward pass are those of one chunk of the prompt."""
    size = (large / "model.safetensors").stat().st_size
    assert size > 120e6
    command = [sys.executable, "-c", MEMORY, str(large)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    once, used, cache, mapped = map(int, done.stdout.split())
    assert mapped > size
    assert once < 40e6
    # A piece of 256 tokens of float32: hidden, qkv, attended, gate and up, and what is packed of them.
    piece = 256 * 4 * (1024 + 4096 + 2048 + 2 * 3072 + 3072)
    assert used < once + cache + piece + 10e6
