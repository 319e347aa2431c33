"""Reuse of a conversation's cache: always the text that a fresh start would give."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import ReferenceModel

from npqwen.engine.prefix_page import common_prefix
from npqwen.errors import ClosedError, ContextLengthError, OptionError
from npqwen.generation.session import Session
from npqwen.generation.stream import Stream
from npqwen.model import Model, load

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
SUM = "<|im_start|>user\nWhat is {} + {}?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=[4, 8])
def model(request: pytest.FixtureRequest, tiny: Callable[[int], Path]) -> Iterator[Model]:
    with load(tiny(request.param), threads=2) as loaded:
        yield loaded


def check_cache(session: Session) -> None:
    """The cache is bitwise that of its ids run in one pass."""
    ids = session.ids[: session.cache.length]
    assert len(ids) == session.cache.length
    model = session.model
    if not ids or len(ids) + 1 > model.context:
        return
    fresh = model.new_cache()
    model.prefill(ids, fresh)
    assert np.array_equal(model.forward([11], session.cache.fork()), model.forward([11], fresh))


@pytest.mark.parametrize("seed", range(6))
def test_any_turns_give_the_text_of_a_fresh_start(model: Model, seed: int) -> None:
    rng = random.Random(seed)
    sessions = [Session(model)]
    prompt: list[int] = []
    for turn in range(12):
        session = rng.choice(sessions)
        kind = rng.random()
        if kind < 0.5 or not prompt:  # the conversation continues
            prompt = session.ids + model.tokenizer.encode(SUM.format(rng.randrange(50), turn))
        elif kind < 0.7:  # the past is changed, as when thoughts are stripped
            cut = rng.randrange(len(prompt))
            prompt = prompt[:cut] + model.tokenizer.encode("changed") + prompt[cut + rng.randrange(9) :]
        elif kind < 0.8:  # the same again
            prompt = list(prompt)
        else:  # a part of it
            prompt = prompt[: rng.randrange(1, len(prompt) + 1)]
        prompt = prompt[-300:] if len(prompt) > 400 else prompt
        options: dict[str, Any] = {"seed": turn, "max_tokens": rng.choice([1, 3, 12]), "temperature": 0.9}
        if rng.random() < 0.2:
            options["thinking_budget"] = 2
        stream = session.stream(prompt, **options)
        if rng.random() < 0.3:
            for _ in range(rng.randrange(4)):
                next(stream, None)
            stream.close()
        else:
            alone = Stream(model, prompt, **options).completion()
            assert stream.completion().ids == alone.ids
            assert stream.text == alone.text
        check_cache(session)
        if rng.random() < 0.3 and len(sessions) < 4:
            sessions.append(session.fork())
    for session in sessions:
        check_cache(session)


def test_only_what_is_new_is_computed(model: Model) -> None:
    session = Session(model)
    first = model.tokenizer.encode(SUM.format(17, 25))
    done = session.stream(first, temperature=0).completion()
    assert done.usage.cached_tokens == 0
    second = first + done.ids + model.tokenizer.encode("\n" + SUM.format(1, 2))
    reports: list[tuple[int, int]] = []
    done = session.stream(second, temperature=0, progress=lambda *state: reports.append(state)).completion()
    held = second.index(4098, len(first))
    assert done.usage.cached_tokens == held  # all but eos, the last one drawn
    assert reports == [(len(second) - held, len(second) - held)]
    again = session.stream(second, temperature=0)
    assert again.completion().text == done.text
    assert again.usage.cached_tokens == len(second) - 1  # one token is always run
    shorter = session.stream(second[: len(first)], temperature=0, max_tokens=3)
    assert shorter.usage.cached_tokens == len(first) - 1
    list(shorter)
    check_cache(session)


def test_a_refused_call_keeps_what_there_is(model: Model) -> None:
    session = Session(model)
    ids = model.tokenizer.encode(SUM.format(3, 4))
    session.stream(ids, max_tokens=2).completion()
    held = session.ids
    impossible: list[dict[str, Any]] = [{"top_p": 7}, {"max_tokens": 0}, {"nonsense": 1}]
    for wrong in impossible:
        with pytest.raises(OptionError):
            session.stream([1, 2, 3], **wrong)
    with pytest.raises(OptionError, match="empty"):
        session.stream([])
    with pytest.raises(ContextLengthError):
        session.stream([5] * 3000)
    assert session.ids == held
    check_cache(session)


def test_a_stream_that_was_left_is_closed_by_the_next(model: Model) -> None:
    session = Session(model)
    first = session.stream(model.tokenizer.encode(SUM.format(17, 25)), temperature=0)
    next(first)
    next(first)
    second = session.stream(model.tokenizer.encode(SUM.format(17, 26)), temperature=0)
    assert list(first) == []
    alone = model.generate(SUM.format(17, 26), temperature=0)
    assert second.completion().ids == alone.ids
    check_cache(session)


def test_a_stream_that_never_started_holds_what_was_common(model: Model) -> None:
    session = Session(model)
    session.stream(model.tokenizer.encode(SUM.format(17, 25)), max_tokens=4).completion()
    other = model.tokenizer.encode(SUM.format(19, 25))
    session.stream(other)
    assert session.ids == other
    assert 0 < session.cache.length < len(other)
    check_cache(session)


class Failing(ReferenceModel):
    """A model whose passes fail in the middle, after part of the prompt."""

    allowed = 10**9
    error = BaseException()

    def forward(self, ids: Any, cache: Any, **options: Any) -> np.ndarray:
        if self.allowed <= 0:
            raise self.error
        self.allowed -= 1
        return super().forward(ids, cache, **options)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ClosedError])
@pytest.mark.parametrize("allowed", [0, 1, 2, 3, 4])
def test_passes_that_are_interrupted_leave_ids_and_cache_alike(error: type[BaseException], allowed: int) -> None:
    model = Failing.from_directory(TINY)
    model.error = error()
    session = Session(model)
    long = model.tokenizer.encode("a b c d " * 50)  # in pieces of 64
    model.allowed = allowed
    stream = session.stream(long, max_tokens=3)
    with pytest.raises(error):
        stream.completion()
    assert session.ids == long + stream.ids
    held = session.cache.length
    model.allowed = 10**9
    fork = session.fork()
    done = session.stream(long, max_tokens=3, temperature=0).completion()
    assert done.ids == Stream(model, long, max_tokens=3, temperature=0).completion().ids
    assert done.usage.cached_tokens == min(held, len(long) - 1)
    assert fork.cache.length == held


INTERRUPTED = """
import signal, sys
import numpy as np
from pathlib import Path
from npqwen.model import load
from npqwen.generation.session import Session
model = load(Path(sys.argv[1]), threads=2)
session = Session(model)
prompt = [int(i) for i in np.random.default_rng(0).integers(0, 4000, 300)]
rounds = interrupted = 0
while interrupted < 20:
    rounds += 1
    signal.setitimer(signal.ITIMER_REAL, 0.0005 * (rounds % 40))
    try:
        session.stream(prompt[: 30 + 20 * (rounds % 13)], seed=rounds, max_tokens=30).completion()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    ids = session.ids[: session.cache.length]
    assert len(ids) == session.cache.length
    if ids:
        fresh = model.new_cache()
        model.prefill(ids, fresh)
        assert np.array_equal(model.forward([7], session.cache.fork()), model.forward([7], fresh)), rounds
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_ctrl_c_at_any_moment_leaves_ids_and_cache_alike(tiny: Callable[[int], Path]) -> None:
    code = "import signal\nsignal.signal(signal.SIGALRM, signal.default_int_handler)\n" + INTERRUPTED
    done = subprocess.run([sys.executable, "-c", code, str(tiny(4))], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_forks_are_independent(model: Model) -> None:
    session = Session(model)
    ids = model.tokenizer.encode(SUM.format(17, 25))
    session.prefill(ids)
    assert session.ids == ids
    forks = [session.fork() for _ in range(3)]
    streams = [
        fork.stream(ids + model.tokenizer.encode(text), temperature=0, max_tokens=9)
        for fork, text in zip(forks, ["<think>", "17 + 25", "The"], strict=True)
    ]
    for _ in range(4):  # one step each in turn
        for stream in streams:
            next(stream, None)
    for fork, stream in zip(forks, streams, strict=True):
        alone = Stream(model, stream.prompt_ids, temperature=0, max_tokens=9).completion()
        assert stream.completion().ids == alone.ids
        assert stream.usage.cached_tokens == len(ids)
        check_cache(fork)
    assert session.ids == ids
    check_cache(session)


def test_reading_ahead(model: Model) -> None:
    session = Session(model)
    ids = model.tokenizer.encode("A river is a stream of water. " * 20)
    reports: list[tuple[int, int]] = []
    session.prefill(ids[:50])
    session.prefill(ids, lambda *state: reports.append(state))
    assert reports[-1] == (len(ids) - 50, len(ids) - 50)
    session.prefill(ids[:70])
    assert session.ids == ids[:70]
    check_cache(session)


def test_a_session_whose_stream_runs_in_another_thread_says_so(model: Model) -> None:
    session = Session(model)
    inside, go_on = threading.Event(), threading.Event()

    def processor(ids: list[int], logits: np.ndarray) -> None:
        inside.set()
        assert go_on.wait(60)

    stream = session.stream([1, 2, 3], logits_processor=processor, max_tokens=2)
    thread = threading.Thread(target=lambda: list(stream))
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(OptionError, match="another thread is running the session"):
            session.stream([4, 5])
    finally:
        go_on.set()
        thread.join(60)
    assert len(stream.ids) == 2
    session.stream([1, 2, 4], max_tokens=2).completion()
    check_cache(session)


def test_common_prefixes() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 3
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1
    assert common_prefix([2], [1]) == 0


def test_streams_that_take_turns_give_what_they_give_alone(model: Model) -> None:
    """In one thread, a token at a time, and in many threads at once."""
    prompts = [SUM.format(a, b) for a, b in ((17, 25), (3, 4), (40, 9), (8, 8))]
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "top_k": 5, "presence_penalty": 0.3}
    alone = [model.generate(prompt, seed=i, **options) for i, prompt in enumerate(prompts)]

    streams = [model.stream(prompt, seed=i, **options) for i, prompt in enumerate(prompts)]
    running = list(streams)
    while running:
        running = [stream for stream in running if next(stream, None) is not None]
    assert [stream.ids for stream in streams] == [each.ids for each in alone]
    assert [stream.text for stream in streams] == [each.text for each in alone]

    streams = [model.stream(prompt, seed=i, **options) for i, prompt in enumerate(prompts)]
    threads = [threading.Thread(target=lambda stream=stream: list(stream)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [stream.ids for stream in streams] == [each.ids for each in alone]
    assert [stream.text for stream in streams] == [each.text for each in alone]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (b"Hello", "the prompt is b'Hello'; give text or token ids"),
        (5, "the prompt is 5; give text or token ids"),
        (None, "the prompt is None; give text or token ids"),
        ([1, 1.5], r"the prompt has 1\.5; each token id must be a whole number"),
        ([True], "the prompt has True; each token id"),
        (np.array([1.0, 2.0]), r"the prompt has 1\.0; each token id"),
        (np.array([[1, 2]]), r"the prompt has \[1, 2\]; each token id"),
        (np.float32(3), r"the prompt is .*3\.0.*; give text or token ids"),
        (["a"], "the prompt has 'a'; each token id"),
    ],
    ids=str,
)
def test_prompts_that_are_not_ids_are_refused_and_the_session_keeps_what_it_has(
    model: Model, ids: Any, message: str
) -> None:
    session = Session(model)
    session.prefill([1, 2, 3])
    for call in (session.stream, session.prefill, lambda ids: Stream(model, ids)):
        with pytest.raises(OptionError, match=f"^{message}"):
            call(ids)
    assert session.ids == [1, 2, 3]
    assert session.stream(np.array([1, 2, 4]), max_tokens=1).prompt_ids == [1, 2, 4]


def test_wrong_arguments_of_streams_and_sessions_are_named(model: Model) -> None:
    cache = model.new_cache()
    wrong: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (Session, {"model": 3}, "the model is int"),
        (Session(model).save, {"path": 3}, "the path is 3"),
        (Session.load, {"model": model, "path": None}, "the path is None"),
        (Session(model).prefill, {"prompt": [1], "progress": 3}, "progress is 3, not a function"),
        (Stream, {"model": model, "prompt": [1], "cache": 3}, "cache is int; make one with the model's new_cache"),
        (Stream, {"model": model, "prompt": [1, 2], "cache": cache, "cached": "1"}, "cached is '1'; it must be"),
        (Stream, {"model": model, "prompt": [1, 2], "cache": cache, "cached": 1}, "cached is 1"),
        (Stream(model, [1]).force, {"ids": [1.5]}, r"ids has 1\.5; each token id must be a whole number"),
        (Stream(model, [1]).force, {"ids": "a"}, "ids is text"),
        (Stream(model, [1]).end, {"reason": "soon"}, "the reason is 'soon'; it must be stop, length or loop"),
    ]
    for call, arguments, message in wrong:
        with pytest.raises(OptionError, match=f"^{message}"):
            call(**arguments)
