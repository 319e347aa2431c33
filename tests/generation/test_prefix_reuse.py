"""Prefixes that are not computed again change no text: alone, in sessions and in batches, from memory and files."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reciter import recite

import npqwen
from npqwen.errors import OptionError, OutputError
from npqwen.generation.batch import Batch
from npqwen.generation.sequence import Sequence
from npqwen.generation.session import Session
from npqwen.generation.stream import Stream
from npqwen.model import Model, load

ENDLESS = {4096: -np.inf, 4098: -np.inf}
WORDS = "The river runs through the town, and the town has a mill, a bridge and a market. "
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3, "top_logprobs": 3},
    {"temperature": 1.3, "seed": 4, "top_p": 0.9, "top_k": 0},
    {"temperature": 0.8, "seed": 5, "min_p": 0.05, "stop": ["e r", "1"]},
    {"temperature": 1.0, "seed": 6, "presence_penalty": 1.5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 8, "logit_bias": {13: 5.0, 11: -np.inf}},
    {"temperature": 1.0, "seed": 10, "thinking_budget": 5, "logprobs": True},
]


@pytest.fixture(scope="module", params=[4, 16])
def path(request: pytest.FixtureRequest, tiny: Callable[[int], Path]) -> Path:
    return tiny(request.param)


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[Model]:
    """A model that computes everything."""
    with load(path, threads=2, prefix_memory=0) as model:
        yield model


def ids_of(model: Model, rng: random.Random) -> list[int]:
    """A prompt that has parts in common with others."""
    texts = [WORDS * 16, WORDS * 16, "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n", "A"]
    ids: list[int] = []
    for _ in range(rng.randrange(1, 4)):
        more = model.tokenizer.encode(rng.choice(texts))
        ids += more[: rng.choice([1, 20, 100, 255, 256, 257, 400])]
    return ids[:900]


@pytest.mark.parametrize("seed", range(6))
def test_a_text_is_the_same_with_pool_and_files_as_without(plain: Model, path: Path, tmp_path: Path, seed: int) -> None:
    """Random prompts and options, by every way that there is, in one run and the next, with little and much memory."""
    rng = random.Random(seed)
    reused = 0
    for _ in range(3):
        memory = rng.choice([None, 3 << 20, 20 << 20])
        with load(path, threads=2, prefix_cache=tmp_path, prefix_memory=memory) as model:
            session = Session(model)
            for _ in range(6):
                prompt, options = ids_of(model, rng), rng.choice(OPTIONS) | {"max_tokens": rng.choice([1, 3, 20, 60])}
                way = rng.choice(["stream", "session", "closed", "batch", "prefill"])
                expected = Stream(plain, prompt, **options)
                expected.completion()
                if way == "prefill":
                    logits = session.prefill(prompt)
                    assert np.array_equal(logits, plain.prefill(prompt, plain.new_cache()))
                    continue
                if way == "batch":
                    batch = Batch(model)
                    company = [Stream(model, ids_of(model, rng), batch=batch, max_tokens=5) for _ in range(2)]
                    stream = Stream(model, prompt, batch=batch, **options)
                    stream.completion()
                    for one in company:
                        one.completion()
                else:
                    stream = (session.stream if way == "session" else model.stream)(prompt, **options)
                    for _ in stream:
                        if way == "closed" and rng.random() < 0.2:
                            stream.close()
                            break
                assert stream.ids == expected.ids[: len(stream.ids)]
                if stream.finish_reason is not None:
                    assert (stream.text, stream.logprobs) == (expected.text, expected.logprobs)
                    assert len(stream.ids) == len(expected.ids)
                assert stream.usage.cached_tokens < len(prompt)
                reused += stream.usage.cached_tokens
    assert reused > 100


def test_all_that_a_model_runs_shares_one_pool(path: Path) -> None:
    with load(path, threads=2) as model:
        ids = model.tokenizer.encode(WORDS * 20)[:500]
        first = model.generate(ids, max_tokens=2, temperature=0, logit_bias=ENDLESS)
        assert first.usage.cached_tokens == 0
        assert model.generate(ids, max_tokens=2).usage.cached_tokens == len(ids) - 1
        session = Session(model)
        stream = session.stream([*ids, 5], max_tokens=2)
        stream.completion()
        assert stream.usage.cached_tokens == len(ids)
        assert Session(model).stream([*ids, 5, 6], max_tokens=1).completion().usage.cached_tokens == len(ids) + 1
        both = model.generate([[*ids, 9], [*ids, 8]], max_tokens=1)
        assert [one.usage.cached_tokens for one in both] == [len(ids)] * 2
        before = model.prefixes.nbytes
        model.score(ids, [" a", " b"])
        assert model.prefixes.nbytes == before
    assert model.prefixes.nbytes == 0


def test_conversations_share_what_they_are_told_first(tiny: Callable[[int], Path], tmp_path: Path) -> None:
    system = "You answer in few words. " * 30
    with load(tiny(4), threads=2, prefix_cache=tmp_path) as model:
        known = len(model.tokenizer.encode(system))
        first = model.conversation(system).send("What is 3 + 4?", max_tokens=3, seed=1)
        other = model.conversation(system).send("And 5 + 6?", max_tokens=3, seed=1)
        assert first.usage.cached_tokens == 0
        assert other.usage.cached_tokens >= known
    with load(tiny(4), threads=2, prefix_cache=tmp_path) as model:
        again = model.chat([{"role": "system", "content": system}, {"role": "user", "content": "1?"}], max_tokens=3)
        assert again.usage.cached_tokens >= known


def test_who_changes_a_cache_behind_a_streams_back_does_not_mislead_others(path: Path, plain: Model) -> None:
    ids = [int(id) for id in np.random.default_rng(3).integers(0, 4096, 400)]
    with load(path, threads=2) as model:
        for change in ("cut", "append"):
            model.prefixes.clear()
            cache = model.new_cache()
            stream = Stream(model, ids, cache=cache, max_tokens=20, temperature=0, logit_bias=ENDLESS)
            while len(stream.ids) < 5:
                next(stream)
            if change == "cut":
                cache.truncate(300)
                model.prefill(np.full(200, 7), cache)
            else:
                model.forward([7, 8, 9], cache)
            text = ids + stream.ids
            stream.close()
            prompt = [*text, 1]
            again = model.generate(prompt, max_tokens=5, temperature=0)
            assert again.ids == plain.generate(prompt, max_tokens=5, temperature=0).ids


def test_an_interrupted_prompt_is_not_kept_beyond_what_was_computed(path: Path, plain: Model) -> None:
    ids = [int(id) for id in np.random.default_rng(3).integers(0, 4096, 900)]

    def interrupt(done: int, total: int) -> None:
        if done >= 500:
            raise KeyboardInterrupt

    with load(path, threads=2) as model:
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, max_tokens=5, temperature=0, progress=interrupt)
        again = model.generate(ids, max_tokens=5, temperature=0)
        assert again.ids == plain.generate(ids, max_tokens=5, temperature=0).ids


def test_when_memory_is_short_prefixes_are_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(path, threads=2) as model:
        model.generate(WORDS * 20, max_tokens=1)
        page = model.new_cache(1).page_bytes
        assert model.prefixes.nbytes >= page
        monkeypatch.setattr(
            "npqwen.engine.kv_cache.available_memory",
            lambda: (1 << 40) if model.prefixes.nbytes == 0 else 0,
        )
        model.generate("Something else", max_tokens=1)
        assert model.prefixes.nbytes == 0  # so there was room, and so short a text is not kept


def test_options_of_the_pool(path: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="prefix_cache_size has no effect without prefix_cache"):
        load(path, prefix_cache_size=10**9)
    with pytest.raises(OptionError, match=r"prefix_memory is -1; it must be a whole number, 0 or more"):
        load(path, prefix_memory=-1)
    with pytest.raises(OptionError, match=r"prefix_memory is 5; with prefix_cache it must be at least \d+, one page"):
        load(path, prefix_cache=tmp_path, prefix_memory=5)
    with pytest.raises(OptionError, match="is too small: 256 tokens of this model take"):
        load(path, prefix_cache=tmp_path, prefix_cache_size=1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file; a prefix cache is a directory"):
        npqwen.load("no/such-model", prefix_cache=tmp_path / "file")  # before the model is looked for
    with load(path, prefix_memory=0) as model:
        model.generate(WORDS * 20, max_tokens=1)
        assert model.generate(WORDS * 20, max_tokens=1).usage.cached_tokens == 0


def test_pages_in_memory_make_room_for_pages_of_files(
    tiny: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(tiny(4), threads=1, prefix_cache=tmp_path) as model:
        model.generate(WORDS * 20, max_tokens=1)
    with load(tiny(4), threads=1, prefix_cache=tmp_path) as model:
        model.generate("Another text. " * 40, max_tokens=1)
        assert model.prefixes.nbytes
        scarce = lambda: None if not model.prefixes.nbytes else 0  # noqa: E731
        monkeypatch.setattr("npqwen.engine.kv_cache.available_memory", scarce)
        ids = np.array(model.tokenizer.encode(WORDS * 20), np.int32)
        assert model.prefixes.fetch(ids).length > len(ids) // 2


def test_texts_share_prefixes_with_those_of_the_same_salt_only(tiny: Callable[[int], Path], tmp_path: Path) -> None:
    def cached(model: Model, **options: Any) -> int:
        return int(model.generate(WORDS * 20, max_tokens=2, **options).usage.cached_tokens)

    for start in (False, True):  # the second time, they are in files
        with load(tiny(4), threads=1, prefix_cache=tmp_path) as model:
            assert (cached(model) > 0) is start
            assert (cached(model, cache_salt="a") > 0) is start
            assert (cached(model, cache_salt="b") > 0) is start
            assert min(cached(model), cached(model, cache_salt="a"), cached(model, cache_salt="b")) > 0
    with load(tiny(4), threads=1) as model:
        batch = Batch(model)
        sequences = [Sequence(model, WORDS * 20, max_tokens=30, cache_salt=salt) for salt in ("", "a", "b", "a", "")]
        for sequence in sequences:
            batch.add(sequence, lambda text: None, lambda error: None)
        while batch.step():
            pass
        assert [sequence.cached > 0 for sequence in sequences] == [False, False, False, True, True]


def test_nothing_is_drafted_from_texts_with_a_salt(tiny: Callable[[int], Path]) -> None:
    with load(tiny(4), threads=1) as model:
        model.generate("A long one", max_tokens=40, seed=1, cache_salt="a", speculation=True)
        assert model.drafting.with_answers([]) == []
        model.generate("A long one", max_tokens=40, seed=1, speculation=True)
        assert model.drafting.with_answers([]) != []


def test_a_model_that_recites_finds_prefixes_too() -> None:
    model = recite("One two three")
    assert model.prefixes.nbytes == 0
    stream = Stream(model, list(range(300)))
    stream.completion()
    assert model.prefixes.nbytes > 0
    sequence = Sequence(model, list(range(280)))
    assert model.prefixes.find(np.arange(279, dtype=np.int32)).length == 279
    assert sequence.cached == 0


FULL = """
import resource, sys, warnings
import npqwen
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    with npqwen.load(sys.argv[1], threads=2, prefix_cache=sys.argv[2]) as model:
        texts = [model.generate(sys.argv[3] * k, max_tokens=20, temperature=0) for k in (20, 20, 30)]
print([text.ids for text in texts])
print([str(warning.message) for warning in seen])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sets a resource limit")
def test_a_disk_that_takes_no_page_is_one_warning_and_the_answers_are_unharmed(
    path: Path, plain: Model, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", FULL, str(path), str(tmp_path / "cache"), WORDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ), check=True)
    ids, warned = done.stdout.splitlines()
    expected = [plain.generate(WORDS * k, max_tokens=20, temperature=0).ids for k in (20, 20, 30)]
    assert ids == str(expected)
    assert warned.count("the prefix cache cannot be written for now: ") == 1
    assert warned.count("', '") == 0
    assert os.listdir(tmp_path / "cache") == []


def test_commands_find_what_earlier_ones_computed(
    tiny: Callable[[int], Path],
    tmp_path: Path,
    run: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "prefixes"
    command = ["generate", tiny(4), WORDS * 20, "--max-tokens", 20, "--temperature", 0, "--prefix-cache", place]
    first, told = run(*command)
    assert "cached" not in told
    again, told = run(*command)
    assert again == first
    assert " of them cached, in " in told
    for file in place.iterdir():
        file.write_bytes(b"damaged")
    repaired, told = run(*command)
    assert repaired == first
    assert "removed a damaged file of the prefix cache: " in told
    question = [WORDS * 20, "--prefix-cache", place, "--prefix-cache-size", "1GB", "--max-tokens", 4, "--seed", 1]
    answers = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
        answers.append(run("chat", tiny(4), *question)[0])
    assert answers[0] == answers[1] != ""
    (tmp_path / "file").write_text("")
    _, told = run("generate", tiny(4), "A", "--prefix-cache", tmp_path / "file", status=2)
    assert "file is a file; a prefix cache is a directory" in told
    _, told = run("generate", tiny(4), "A", "--prefix-cache-size", "2GB", status=2)
    assert "prefix_cache" in told
