"""A loaded model's life: caches, threads, fork, Ctrl-C, close, memory."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_config
from converted import MATRICES, pad, tensors, write_model

from npqwen import ClosedError, ContextLengthError, OptionError
from npqwen.kernels.attention import PAGE
from npqwen.model import Model, load

IDS = np.random.default_rng(0).integers(0, 4096, 1200)
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and fork are POSIX's")


@pytest.fixture(scope="module", params=[4, 16])
def model(request: pytest.FixtureRequest, tiny: Callable[[int], Path]) -> Iterator[Model]:
    """The example model, with either type of cache."""
    with load(tiny(request.param), threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 140 MB in int4: random nibbles, one small scale."""

    def units(bits: int, real: np.ndarray, cols: int, rng: np.random.Generator) -> np.ndarray:
        shape = len(real) // 16, pad(cols, 64) // 64, 576
        out = rng.integers(0, 256, shape, np.uint8)
        out[:, :, :64].view("<f2")[:] = 0.2 / np.sqrt(cols)
        return out

    config = make_config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=15,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=4128,
        max_position_embeddings=8192,
    )
    values = tensors(config, dict.fromkeys(MATRICES, 4), units=units)
    return write_model(tmp_path_factory.mktemp("large"), config, values, 4)


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_cache_cut_back_and_continued_equals_a_new_one(model: Model) -> None:
    used, new = model.new_cache(), model.new_cache()
    model.prefill(IDS[:300], used)
    model.forward(IDS[300:700], used, all_logits=True)
    used.truncate(300)
    model.prefill(IDS[:300], new)
    for at in (700, 701, 720):
        again = model.forward(IDS[at : at + 20], used, all_logits=True)
        assert np.array_equal(again, model.forward(IDS[at : at + 20], new, all_logits=True))
    used.truncate(0)
    assert used.length == 0
    assert np.array_equal(model.prefill(IDS[:300], used), model.prefill(IDS[:300], model.new_cache()))
    with pytest.raises(OptionError, match="cannot cut a cache of 300 tokens to 301"):
        used.truncate(301)
    with pytest.raises(OptionError, match="to -1"):
        used.truncate(-1)


def test_growing_moves_no_page(model: Model) -> None:
    cache = model.new_cache()
    assert cache.nbytes == 0
    model.prefill(IDS[: PAGE - 1], cache)
    assert cache.nbytes == cache.page_bytes
    first = cache.addresses[0]
    page = cache._held.arrays[0]
    before = page.copy()
    for count in (1, 1, 300, PAGE):
        model.prefill(IDS[:count], cache)
    assert cache.length == 2 * PAGE + 301
    assert cache.nbytes == cache.bytes_for(cache.length) == 4 * cache.page_bytes
    assert cache.addresses[0] == first
    assert page is cache._held.arrays[0]
    changed = np.flatnonzero(page != before)
    assert 0 < len(changed) <= page.size / PAGE  # the page's last position, and nothing else


def test_pieces_equal_the_whole_over_many_pages(tiny: Callable[[int], Path]) -> None:
    with load(tiny(16), threads=2) as model:
        whole = model.logits(IDS)
        cache = model.new_cache(len(IDS))
        parts = np.split(IDS, [1, 255, 256, 257, 600, 999])
        pieces = np.concatenate([model.forward(part, cache, all_logits=True) for part in parts])
        assert np.abs(pieces - whole).max() < 1e-3
        assert np.array_equal(model.logits(IDS), whole)


def test_a_full_cache_is_refused_and_unchanged(model: Model) -> None:
    cache = model.new_cache(300)
    model.prefill(IDS[:200], cache)
    state = cache.length, cache.nbytes, cache.addresses.copy()
    for call in (model.forward, model.prefill):
        with pytest.raises(ContextLengthError, match=r"200 tokens in the cache and 101 more .* limit of 300"):
            call(IDS[:101], cache)
    assert (cache.length, cache.nbytes) == state[:2]
    assert np.array_equal(cache.addresses, state[2])
    model.prefill(IDS[200:300], cache)
    assert cache.length == 300
    with pytest.raises(ContextLengthError):
        model.forward(IDS[:1], cache)
    assert np.array_equal(
        model.prefill(IDS[:9], model.new_cache(9)), model.prefill(IDS[:9], model.new_cache())
    )


def test_the_context_is_a_limit(model: Model, tiny: Callable[[int], Path]) -> None:
    assert model.context == 2048
    for room in (0, -1, 2049):
        with pytest.raises(ContextLengthError, match=f"a cache for {room} tokens"):
            model.new_cache(room)
    with pytest.raises(ContextLengthError):
        model.logits(np.zeros(2049, np.int64))
    with load(tiny(4), threads=1, context=64) as short:
        assert short.context == 64
        assert short.logits(IDS[:64]).shape == (64, 4128)
        with pytest.raises(ContextLengthError):
            short.logits(IDS[:65])
    for context in (0, -5, 2049):
        with pytest.raises(OptionError, match="1 to 2048"):
            load(tiny(4), context=context)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([], "no tokens"),
        (np.zeros((0,), np.int32), "no tokens"),
        ([5, -1], "token id -1 is outside the model's 0 to 4127"),
        ([4128], "token id 4128"),
        (np.array([2**40]), "token id 1099511627776"),
        ([1.5], "whole numbers"),
        (np.array([1.0, 2.0]), "whole numbers"),
        (["a"], "whole numbers"),
        ("hello", "whole numbers"),
        ([[1, 2], [3, 4]], "one sequence"),
        (np.array([2**63], np.uint64), "token id 9223372036854775808"),
    ],
)
def test_ids_that_are_none(model: Model, ids: object, problem: str) -> None:
    cache = model.new_cache()
    for call in (
        lambda: model.forward(ids, cache),
        lambda: model.prefill(ids, cache),
        lambda: model.logits(ids),
    ):
        with pytest.raises(OptionError, match=problem):
            call()
    assert cache.length == 0


def test_ids_of_any_integer_type(model: Model) -> None:
    expected = model.logits([1, 2, 300])
    for ids in ((1, 2, 300), np.array([1, 2, 300], np.uint16), np.array([1, 0, 2, 0, 300, 0], np.int32)[::2]):
        assert np.array_equal(model.logits(ids), expected)
    assert expected.dtype == np.float32
    assert model.logits(7).shape == (1, 4128)


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
    for call in calls:
        with pytest.raises(ClosedError, match="the model is closed; load it again"):
            call()
    assert cache.length == 10


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_impossible_numbers_of_threads(tiny: Callable[[int], Path], threads: int) -> None:
    with pytest.raises(OptionError, match=f"threads is {threads}"):
        load(tiny(4), threads=threads)


@pytest.mark.parametrize("threads", [1, 3, 8, 33])
def test_any_number_of_threads_gives_the_same(model: Model, threads: int) -> None:
    """More threads than cores as well: they give way to each other."""
    with load(model.path, threads=threads) as other:
        assert np.array_equal(other.logits(IDS[:40]), model.logits(IDS[:40]))
        text = other.generate("A river is", max_tokens=8, temperature=0).text
        assert text == model.generate("A river is", max_tokens=8, temperature=0).text


def test_threads_end_with_the_model(tiny: Callable[[int], Path]) -> None:
    before = threading.active_count()
    with load(tiny(4), threads=5) as model:
        assert threading.active_count() == before + 5
        workers = [thread for thread in threading.enumerate() if thread.name.startswith("npqwen-")]
        assert len(workers) >= 5
        model.logits([1])
    for thread in workers[-5:]:
        thread.join(30)
        assert not thread.is_alive()
    assert threading.active_count() == before


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
        model.close()
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
running = False
thread.join()
print("done")
"""


@posix
def test_fork_during_use(tiny: Callable[[int], Path]) -> None:
    """The child finds a lock that a thread held which it does not have."""
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
    """Loading copies no weights; what a forward pass writes to is bounded by one piece of the prompt."""
    size = (large / "model.safetensors").stat().st_size
    assert size > 120e6
    done = python(MEMORY, large)
    assert done.returncode == 0, done.stderr
    once, used, cache, mapped = map(int, done.stdout.split())
    assert mapped > size
    assert once < 40e6
    # A piece of 256 tokens of float32: hidden, qkv, attended, gate and up, and what is packed of them.
    piece = 256 * 4 * (1024 + 4096 + 2048 + 2 * 3072 + 3072)
    assert used < once + cache + piece + 10e6
