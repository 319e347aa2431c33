"""A model's threads: many callers, forked processes, Ctrl-C, and models that are closed or dropped."""

from __future__ import annotations

import copy
import gc
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npqwen import ClosedError, OptionError
from npqwen.engine.budget import Budget
from npqwen.engine.runner import SHORT_PASS
from npqwen.engine.team import Team
from npqwen.model import Model, load

IDS = np.random.default_rng(0).integers(0, 4096, 1200)
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and fork are POSIX's")


@pytest.fixture(scope="module", params=[4, 16])
def model(request: pytest.FixtureRequest, tiny: Callable[[int], Path]) -> Iterator[Model]:
    """The example model, with each dtype of the cache."""
    with load(tiny(request.param), threads=2) as loaded:
        yield loaded


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run code in a new process."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_threads_of_an_app_take_turns(model: Model) -> None:
    prompts = [
        "A river is",
        "<|im_start|>user\nWhat is 3 + 9?<|im_end|>\n<|im_start|>assistant\n",
        "1",
        "The word",
    ]
    alone = [model.generate(prompt, max_tokens=24, seed=5) for prompt in prompts]
    found: dict[int, str] = {}

    def generate(i: int) -> None:
        for _ in range(2):
            found[i] = model.generate(prompts[i % 4], max_tokens=24, seed=5).text
            assert found[i] == alone[i % 4].text

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[i] for i in range(8)] == 2 * [result.text for result in alone]


@pytest.mark.parametrize("turn", range(5))
def test_close_while_others_compute(tiny: Callable[[int], Path], turn: int) -> None:
    model = load(tiny(4), threads=2)
    ends: list[BaseException] = []
    running = threading.Barrier(4)

    def compute() -> None:
        model.logits(IDS[:20])
        running.wait(60)
        try:
            while True:
                model.logits(IDS[:400])
        except BaseException as end:
            ends.append(end)

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    running.wait(60)
    model.close()
    for thread in threads:
        thread.join(60)
    assert [type(end) for end in ends] == [ClosedError] * 3


def test_a_closed_model_computes_no_more(tiny: Callable[[int], Path]) -> None:
    with load(tiny(4), threads=2) as model:
        cache = model.new_cache()
        model.prefill(IDS[:10], cache)
        stream = model.stream("A river is", max_tokens=50)
        next(stream)
    model.close()
    calls: list[Callable[[], object]] = [
        lambda: model.forward([1], cache),
        lambda: model.prefill([1], cache),
        lambda: model.logits([1]),
        lambda: model.generate("A", max_tokens=1),
        lambda: list(stream),
    ]
    for call in [*calls, model.__enter__]:
        with pytest.raises(ClosedError, match="the model is closed; load it again"):
            call()
    assert repr(model) == f"<Model {model.name}: 4 bits, closed>"
    assert cache.length == 10


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_is_not_copied(copied: Callable[[Any], object], tiny: Callable[[int], Path]) -> None:
    with load(tiny(4), threads=1) as model, pytest.raises(TypeError, match="load it in each process"):
        copied(model)


@pytest.mark.parametrize("threads", [0, -1, 1025, 2.0, "2", True])
def test_impossible_numbers_of_threads(tiny: Callable[[int], Path], threads: Any) -> None:
    before = set(threading.enumerate())
    with pytest.raises(OptionError, match=f"threads is {threads!r}; it must be a whole number from 1 to 1024"):
        load(tiny(4), threads=threads)
    assert set(threading.enumerate()) <= before


def test_the_calling_thread_computes_short_passes(
    tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C waits meanwhile: so not where weights are read from disk and one token takes seconds."""
    calls: list[bool] = []
    real = Team.run

    def run(self: Team, *args: Any, on_caller: bool = False, keep: object = None) -> None:
        calls.append(on_caller)
        real(self, *args, on_caller=on_caller, keep=keep)

    monkeypatch.setattr(Team, "run", run)
    monkeypatch.setattr(Budget, "check", lambda *_: None)
    for available, on_caller in ((1 << 40, True), (1 << 20, False)):
        monkeypatch.setattr("npqwen.engine.engine.available_memory", lambda available=available: available)
        with load(tiny(4), threads=2) as model:
            cache = model.new_cache()
            for tokens in (1, SHORT_PASS, SHORT_PASS + 1):
                model.prefill(IDS[:tokens], cache)
        assert calls == [on_caller, on_caller, False]
        calls.clear()


@pytest.mark.parametrize("threads", [1, 3, 8, 33])
def test_any_number_of_threads_gives_equal_logits(model: Model, threads: int) -> None:
    """More threads than cores as well: waiting threads yield."""
    with load(model.path, threads=threads) as other:
        assert np.array_equal(other.logits(IDS[:40]), model.logits(IDS[:40]))
        text = other.generate("A river is", max_tokens=8, temperature=0).text
        assert text == model.generate("A river is", max_tokens=8, temperature=0).text


def test_threads_end_with_the_model(tiny: Callable[[int], Path]) -> None:
    before = set(threading.enumerate())
    with load(tiny(4), threads=5) as model:
        workers = set(threading.enumerate()) - before
        assert sorted(thread.name for thread in workers) == [f"npqwen-{i}" for i in range(5)]
        model.logits([1])
    for thread in workers:
        thread.join(30)
        assert not thread.is_alive()


def test_threads_of_a_dropped_model_end(tiny: Callable[[int], Path]) -> None:
    before = set(threading.enumerate())
    model = load(tiny(4), threads=3)
    model.logits([1])
    workers = set(threading.enumerate()) - before
    assert len(workers) == 3
    del model
    gc.collect()
    for thread in workers:
        thread.join(30)
        assert not thread.is_alive()


FORK = """
import os, sys, warnings
import numpy as np
warnings.simplefilter("ignore")  # Python 3.12 and later warn of threads at fork.
from pathlib import Path
from npqwen.model import load
model = load(Path(sys.argv[1]), threads=2)
cache = model.new_cache()
model.prefill(range(40), cache)
expected = model.forward([7], cache)
cache.truncate(40)
def child():
    for _ in range(3):
        assert np.array_equal(model.forward([7], cache), expected)
        cache.truncate(40)
    assert model.generate("A river is", max_tokens=5).text
    model.close()
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    assert np.array_equal(model.forward([7], cache), expected)
    cache.truncate(40)
    assert os.waitpid(pid, 0)[1] == 0
print("done")
"""


@posix
def test_fork_after_use(tiny: Callable[[int], Path]) -> None:
    done = python(FORK, tiny(4))
    assert (done.stdout, done.stderr) == ("done\n", "")


FORK_IN_USE = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from npqwen.model import load
model = load(Path(sys.argv[1]), threads=2)
expected = model.logits([1, 2]).tolist()
running = True
def compute():
    while running:
        model.logits(range(256))
thread = threading.Thread(target=compute)
thread.start()
for i in range(6):
    time.sleep(0.02)
    pid = os.fork()
    if pid == 0:
        same = i % 3 == 2 or model.logits([1, 2]).tolist() == expected
        idle = not model._runner.is_busy()
        model.close()
        os._exit(0 if same and idle else 1)
    assert os.waitpid(pid, 0)[1] == 0
running = False
thread.join()
print("done")
"""


@posix
def test_fork_during_use(tiny: Callable[[int], Path]) -> None:
    """The child inherits a lock that is held by a thread which it does not have."""
    done = python(FORK_IN_USE, tiny(4))
    assert (done.stdout, done.stderr) == ("done\n", "")


INTERRUPT = """
import sys
import numpy as np
from pathlib import Path
from npqwen.model import load
model = load(Path(sys.argv[1]), threads=2)
short = model.logits(range(30))
ids = np.arange(8000) % 4000
cache = model.new_cache()
model.prefill(ids[:100], cache)
try:
    print("running", flush=True)
    model.prefill(ids[:7000], cache)
    print("not interrupted", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    assert 100 <= cache.length < 7100 and (cache.length - 100) % 256 == 0, cache.length
    assert np.array_equal(model.logits(range(30)), short)
    held = cache.length
    logits = model.forward([5], cache)
    assert cache.length == held + 1 and np.isfinite(logits).all()
    model.close()
    print("works", flush=True)
"""


@posix
@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_ctrl_c_during_a_long_prompt(large: Path, delay: float) -> None:
    command = [sys.executable, "-c", INTERRUPT, str(large)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline() == "running\n", process.stderr.read()
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            start = time.monotonic()
            assert process.stdout.readline() == "interrupted\n", process.stderr.read()
            assert time.monotonic() - start < 5  # a second at most on a machine of one's own
            assert process.stdout.read() == "works\n", process.stderr.read()
        finally:
            process.kill()
