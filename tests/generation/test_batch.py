"""Many texts in one pass: each is the text that it is alone, whatever its company, and none is kept waiting."""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from npqwen.engine.kv_cache import held_bytes
from npqwen.engine.piece import Piece
from npqwen.errors import ClosedError, NpqwenError, OutOfMemoryError
from npqwen.generation import batch as batch_module
from npqwen.generation import prompt_speed
from npqwen.generation.batch import Batch
from npqwen.generation.sequence import Sequence
from npqwen.generation.session import Session
from npqwen.generation.stream import Stream
from npqwen.model import Model, load

STORY = "The river runs through the town, and the town has a mill, a bridge and a market. " * 12
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 40},
    {"temperature": 1.0, "seed": 3, "max_tokens": 30, "top_logprobs": 3},
    {"temperature": 1.3, "seed": 4, "max_tokens": 25, "top_p": 0.9, "top_k": 0},
    {"temperature": 0.8, "seed": 5, "max_tokens": 30, "min_p": 0.05, "top_k": 50, "stop": ["e r", "1"]},
    {"temperature": 1.0, "seed": 6, "max_tokens": 20, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 0.7, "seed": 7, "max_tokens": 35, "repetition_penalty": 1.2, "loop_guard": True},
    {"temperature": 1.0, "seed": 8, "max_tokens": 20, "logit_bias": {13: 5.0, 11: -np.inf}},
    {"temperature": 1.0, "seed": 9, "max_tokens": 20, "logits_processor": lambda ids, logits: logits * 0.5},
    {"temperature": 1.0, "seed": 10, "max_tokens": 60, "thinking_budget": 5, "logprobs": True},
    {"temperature": 1.0, "seed": 11, "max_tokens": 30, "regex": r"[a-z]{3} is (one|two) of \d{2,4}", "logprobs": True},
    {"temperature": 1.2, "seed": 12, "max_tokens": 60, "schema": {"type": "object", "required": ["a"]}},
]
ENDLESS = {4096: -np.inf, 4098: -np.inf}
"""A bias that forbids the tokens that end a text."""
PROMPTS = [
    "A",
    "What is 17 + 25?",
    STORY,
    STORY[:700] + " And then",
    "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n<think>\n",
]


@pytest.fixture(scope="module", params=["4 bits", "16 bits", "mixture"])
def model(request: pytest.FixtureRequest, tiny: Callable[[int], Path], tiny_moe: Path) -> Iterator[Model]:
    path = tiny_moe if request.param == "mixture" else tiny(int(request.param.split()[0]))
    with load(path, threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def dense(tiny: Callable[[int], Path]) -> Iterator[Model]:
    with load(tiny(4), threads=2) as model:
        yield model


@pytest.fixture(autouse=True)
def without_prefixes(request: pytest.FixtureRequest) -> None:
    """What earlier tests computed is computed again."""
    for name in {"model", "dense"} & set(request.fixturenames):
        request.getfixturevalue(name).prefixes.clear()
        request.getfixturevalue(name).prefixes.set_limit(1 << 28)


class Text:
    """A sequence in a batch, and what became of it."""

    def __init__(self, batch: Batch, model: Any, prompt: str, **options: Any) -> None:
        self.sequence = Sequence(model, prompt, **options)
        self.pieces: list[str] = []
        self.ends: list[BaseException | None] = []
        batch.add(self.sequence, self.pieces.append, self.ends.append)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def finish(batch: Batch) -> None:
    while batch.step():
        pass


def small(batch: Batch, monkeypatch: pytest.MonkeyPatch, tokens: int = 48) -> None:
    """Have the batch run prompts in small pieces, as a slow machine does."""
    monkeypatch.setattr(batch_module, "STALL", 1e-9)
    monkeypatch.setattr(batch_module, "ALONE", 1e-9)
    monkeypatch.setattr(prompt_speed, "TILE", tokens)


def same(text: Text, alone: Stream) -> None:
    decoding = text.sequence.decoding
    assert text.ends == [None]
    assert decoding.ids == alone.ids
    assert text.text == decoding.text == alone.text
    assert decoding.finish_reason == alone.finish_reason
    assert decoding.logprobs == alone.logprobs  # to the bit
    assert decoding.thinking_ended_by == alone.thinking_ended_by


@pytest.mark.parametrize("seed", range(3))
def test_a_text_in_company_is_the_text_alone_to_the_bit(
    model: Model, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All samplers, seeds and masks, joining and leaving in any order, with prompts cut into pieces."""
    rng = random.Random(seed)
    jobs = [(rng.choice(PROMPTS), options) for options in OPTIONS]
    rng.shuffle(jobs)
    alone = []
    for prompt, options in jobs:
        alone.append(Stream(model, prompt, **options))
        alone[-1].completion()
        model.prefixes.clear()
    batch = Batch(model, parallel=rng.choice([2, 5, 16]))
    small(batch, monkeypatch)
    texts: list[Text] = []
    for prompt, options in jobs:
        texts.append(Text(batch, model, prompt, **options))
        for _ in range(rng.randrange(6)):
            batch.step()
    gone = Text(batch, model, "One who leaves", max_tokens=100, temperature=0)
    for _ in range(4):
        batch.step()
    batch.cancel(gone.sequence)
    finish(batch)
    assert gone.ends == [None]
    assert gone.sequence.decoding.finish_reason is None
    for text, stream in zip(texts, alone, strict=True):
        same(text, stream)


def test_streams_of_one_batch_advance_together(dense: Model) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 20}
    expected = [dense.generate(prompt, **options).text for prompt in PROMPTS]
    batch = Batch(dense)
    streams = [Stream(dense, prompt, batch=batch, **options) for prompt in PROMPTS]
    streams[0].completion()
    assert all(stream.ids for stream in streams)
    assert [stream.completion().text for stream in streams] == expected
    closed, left = (Stream(dense, "What is", batch=batch, **options) for _ in range(2))
    closed.close()
    assert left.completion().text
    assert (batch.running, batch.waiting, closed.ids) == (0, 0, [])


def test_prefixes_that_others_computed_are_not_computed_again(dense: Model) -> None:
    batch = Batch(dense)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "logit_bias": ENDLESS}
    first = Text(batch, dense, STORY + "One", **options)
    second = Text(batch, dense, STORY + "Two", **options)  # waits for the first one's prompt
    finish(batch)
    third = Text(batch, dense, STORY + "One" + first.text + " and more", **options)  # continues a finished text
    fourth = Text(batch, dense, "Two", **options)
    finish(batch)
    shared = len(dense.tokenizer.encode(STORY)) - 1
    assert [text.sequence.cached for text in (first, fourth)] == [0, 0]
    assert second.sequence.cached >= shared
    assert third.sequence.cached >= shared + 5
    for text in (first, second, third, fourth):
        same(text, _alone(dense, text, **options))


def _alone(model: Model, text: Text, **options: Any) -> Stream:
    """The text as it is alone, with nothing of it computed before."""
    model.prefixes.clear()
    stream = Stream(model, text.sequence.decoding.prompt_ids, **options)
    stream.completion()
    return stream


def test_a_long_prompt_does_not_stop_the_texts_that_are_being_written(
    dense: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(dense)
    small(batch, monkeypatch, 32)
    options: dict[str, Any] = {"temperature": 0.8, "max_tokens": 200, "logit_bias": ENDLESS}
    writing = [Text(batch, dense, "One two", seed=i, **options) for i in range(3)]
    for _ in range(5):
        batch.step()
    long = Text(batch, dense, STORY, temperature=0, max_tokens=5)
    while long.sequence.reads_prompt:
        before = [len(text.sequence.decoding.ids) for text in writing]
        read = long.sequence.length
        batch.step()
        assert [len(text.sequence.decoding.ids) - n for text, n in zip(writing, before, strict=True)] == [1, 1, 1]
        assert 0 < long.sequence.length - read <= 64
    batch.fail(ClosedError("enough"))


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_long_one_for_ever(
    dense: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(batch_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    batch = Batch(dense)
    forward_pieces = dense.forward_pieces

    def slow(pieces: list[Piece], out: Any = None, maxima: Any = None) -> list[NDArray[np.float32]]:
        clock.now += 0.01 * sum(piece.ids.size for piece in pieces)
        return forward_pieces(pieces, out, maxima)

    monkeypatch.setattr(dense, "forward_pieces", slow)
    Text(batch, dense, "One", temperature=0.9, seed=1, max_tokens=500, logit_bias=ENDLESS)
    batch.step()
    long = Text(batch, dense, STORY * 2, temperature=0, max_tokens=5)
    batch.step()
    begun = []
    for k in range(40):  # more short prompts than there is time for
        short = Text(batch, dense, f"{k} is a number that {k} knows, as {k} of {k} do. " * 4, max_tokens=1, seed=k)
        for _ in range(6):
            batch.step()
        begun.append(bool(short.sequence.decoding.ids))
        if long.sequence.decoding.ids:
            break
    assert begun[0]
    assert long.sequence.decoding.ids
    assert len(begun) > 3
    batch.fail(ClosedError("enough"))


def test_when_memory_is_short_the_youngest_waits_and_is_computed_again(dense: Model) -> None:
    page = dense.new_cache(1).page_bytes
    options: dict[str, Any] = {"temperature": 0.9, "seed": 1, "max_tokens": 600, "logprobs": True}
    options |= {"logit_bias": ENDLESS, "speculation": False}  # so that the texts grow at the same pace
    batch = Batch(dense, memory=5 * page)
    kept = Text(batch, dense, "Something that has ended before, long ago and far away, and was kept", max_tokens=1)
    finish(batch)
    assert batch.cache_bytes == page
    texts = [Text(batch, dense, f"{i} is the number of", **options) for i in range(4)]
    most = 0
    while batch.step():
        most = max(most, batch.cache_bytes)
    assert most <= 5 * page
    assert batch.statistics.preempted > 0
    for text in texts:
        same(text, _alone(dense, text, **options))
    assert kept.ends == [None]


def test_alone_and_without_memory_a_text_ends_with_the_reason(dense: Model) -> None:
    batch = Batch(dense, memory=dense.new_cache(1).page_bytes)
    text = Text(batch, dense, "One", temperature=0.9, seed=1, max_tokens=400, logit_bias=ENDLESS)
    finish(batch)
    assert isinstance(text.ends[0], OutOfMemoryError)
    assert "memory for keys and values" in str(text.ends[0])


def test_a_waiting_text_begins_when_there_is_memory(dense: Model) -> None:
    batch = Batch(dense, memory=3 * dense.new_cache(1).page_bytes)
    first = Text(batch, dense, STORY, temperature=0, max_tokens=3)
    second = Text(batch, dense, STORY[3:], temperature=0, max_tokens=3)
    batch.step()
    assert (batch.running, batch.waiting) == (1, 1)
    finish(batch)
    assert first.ends == second.ends == [None]


def test_an_error_ends_one_text_only(dense: Model) -> None:
    def fails(ids: list[int], logits: NDArray[np.float32]) -> None:
        if len(ids) > 18:
            raise RuntimeError("mine")

    batch = Batch(dense)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "logit_bias": ENDLESS}
    wrong = Text(batch, dense, "What is 17 + 25?", logits_processor=fails, **options)
    right = Text(batch, dense, "What is 17 + 25?", **options)
    finish(batch)
    assert [str(error) for error in wrong.ends] == ["mine"]
    same(right, _alone(dense, right, **options))


def test_what_the_model_raises_leaves_the_texts_as_they_were(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(dense)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 20}
    texts = [Text(batch, dense, prompt, **options) for prompt in PROMPTS[:3]]
    for _ in range(3):
        batch.step()
    with monkeypatch.context() as patch:

        def interrupted(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(dense, "forward_pieces", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.step()
    finish(batch)
    for text in texts:
        same(text, _alone(dense, text, **options))


def test_failing_a_batch_ends_all_of_it(dense: Model) -> None:
    batch = Batch(dense, parallel=1)
    texts = [Text(batch, dense, "One", max_tokens=20) for _ in range(3)]
    batch.step()
    error = NpqwenError("over")
    batch.fail(error)
    assert [text.ends for text in texts] == [[error]] * 3
    assert not batch.step()


def test_a_sessions_cache_stays_its_own(dense: Model) -> None:
    session = Session(dense)
    session.prefill(STORY[:400])
    batch = Batch(dense)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    stream = session.stream(STORY, batch=batch, **options)
    other = Stream(dense, STORY + "x", batch=batch, **options)
    text = stream.completion()
    assert text.usage.cached_tokens > 50
    continued = session.continue_(**options).completion()  # writes to the session's cache
    assert other.completion().text == dense.generate(STORY + "x", **options).text
    assert continued.text == dense.generate([*stream.prompt_ids, *stream.ids], **options).text


@pytest.mark.parametrize("end", ["finished", "cancelled", "failed"])
def test_who_keeps_an_ended_text_keeps_no_keys_and_values(end: str, dense: Model) -> None:
    batch = Batch(dense)
    text = Text(batch, dense, PROMPTS[1], max_tokens=5, temperature=0, logit_bias=ENDLESS)
    batch.step()
    cache = weakref.ref(text.sequence.cache)
    assert cache() is not None
    if end == "cancelled":
        batch.cancel(text.sequence)
    if end == "failed":
        batch.fail(ClosedError("closed"))
    while batch.step():
        pass
    assert len(text.ends) == 1
    assert cache() is None
    if end == "finished":
        assert text.sequence.completion().text == text.text


def test_pages_are_counted_once(dense: Model) -> None:
    cache = dense.new_cache()
    dense.prefill(np.zeros(600, np.int64), cache)
    fork = cache.fork(512)
    assert held_bytes([cache, fork]) == cache.nbytes == 3 * cache.page_bytes
    assert held_bytes([cache, cache.fork(600)]) == 4 * cache.page_bytes


def test_a_text_that_is_cancelled_while_it_begins_ends(dense: Model) -> None:
    batch = Batch(dense)
    text = Text(batch, dense, "One", max_tokens=20)
    has_memory = batch._has_memory

    def cancel(*arguments: Any) -> bool:  # as another thread may
        batch._waiting, waiting = deque(), batch._waiting
        batch.cancel(text.sequence)
        batch._waiting = waiting
        return has_memory(*arguments)

    with mock.patch.object(batch, "_has_memory", cancel):
        batch.step()
    batch.step()
    assert text.ends == [None]
    assert not batch.step()


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_many_forced_tokens_are_scored_over_several_passes(
    dense: Model, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = " ".join(["there was a little dog"] * 12)
    options: dict[str, Any] = {"choice": [said], "top_logprobs": 2, "max_tokens": 300, "temperature": 0}
    alone = Stream(dense, "Hi", **options)
    alone.completion()
    dense.prefixes.clear()
    batch = Batch(dense)
    small(batch, monkeypatch, tokens)
    texts = [Text(batch, dense, "Hi", **options) for _ in range(2)]
    for _ in range(400):
        batch.step()
    for text in texts:
        same(text, alone)
    assert alone.text == said


@pytest.mark.parametrize("chunk", [256, 12])
def test_a_slow_machine_runs_a_step_of_every_text(
    dense: Model, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if there are more texts than tokens of a prompt would fit into the pass, or than a pass has tokens."""
    batch = Batch(dense, parallel=24)
    small(batch, monkeypatch, 4)
    texts = [Text(batch, dense, f"{i} a", max_tokens=40, seed=i, logit_bias=ENDLESS) for i in range(23)]
    for text in texts:
        while not text.sequence.decoding.ids:
            batch.step()
    monkeypatch.setattr(dense, "chunk", chunk)
    late = Text(batch, dense, STORY, max_tokens=1)
    before = [len(text.sequence.decoding.ids) for text in texts]
    for _ in range(6):
        batch.step()
    gained = [len(text.sequence.decoding.ids) - old for text, old in zip(texts, before, strict=True)]
    if chunk == 256:
        assert gained == [6] * 23
        assert late.sequence.length == 6 * 4
    else:
        assert sum(gained) == 6 * 12
        assert max(gained) - min(gained) <= 1


def test_a_prompt_that_is_read_again_counts_once(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    page = dense.new_cache(1).page_bytes
    dense.prefixes.set_limit(0)
    batch = Batch(dense, memory=13 * page)
    small(batch, monkeypatch, 16)
    options: dict[str, Any] = {"max_tokens": 600, "logit_bias": ENDLESS, "speculation": False}
    writers = [Text(batch, dense, f"{i} a", seed=i, **options) for i in range(3)]
    while len(writers[0].sequence.decoding.ids) < 480:
        batch.step()
    reader = Text(batch, dense, dense.tokenizer.decode(dense.tokenizer.encode(STORY * 8)[:1500]), max_tokens=5)
    while not batch.statistics.preempted:
        assert batch.step()
    assert not reader.sequence.decoding.ids
    finish(batch)
    texts = [*writers, reader]
    assert batch.statistics.prompt_tokens == sum(len(text.sequence.decoding.prompt_ids) for text in texts)
    assert [text.ends for text in texts] == [[None]] * 4
