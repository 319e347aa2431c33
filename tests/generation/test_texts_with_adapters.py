"""Texts with LoRA adapters: what is chosen for one text never reaches another, by whatever way it is generated."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY
from lora import adapted, write_adapter
from reference import ReferenceModel, read_safetensors

import npqwen
from npqwen.engine.prefixes import Prefixes
from npqwen.format.config import Config
from npqwen.generation.batch import Batch
from npqwen.generation.session import Session
from npqwen.generation.stream import Stream
from npqwen.model import Model, load

LETTER = [int(id) for id in np.random.default_rng(3).integers(0, 4096, 300)]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logit_bias": {4096: -np.inf, 4098: -np.inf}}
NAMES = (None, "a", "b")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    tensors = read_safetensors(TINY / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return {
        "a": write_adapter(place / "a", shapes, rank=8, size=2),
        "b": write_adapter(place / "b", shapes, ("q_proj", "v_proj", "down_proj"), rank=4, seed=1, size=3),
    }


@pytest.fixture(scope="module")
def plain(tiny: Callable[[int], Path], adapters: dict[str, Path]) -> Iterator[Model]:
    """A model that keeps no prefixes."""
    with load(tiny(16), threads=2, adapters=adapters, prefix_memory=0) as model:
        yield model


@pytest.fixture
def model(tiny: Callable[[int], Path], adapters: dict[str, Path]) -> Iterator[Model]:
    with load(tiny(16), threads=2, adapters=adapters) as model:
        yield model


@pytest.fixture(scope="module")
def expected(plain: Model) -> dict[str | None, list[int]]:
    """The text after LETTER with each adapter."""
    texts = {name: plain.generate(LETTER, adapter=name, **GREEDY).ids for name in NAMES}
    assert len({tuple(ids) for ids in texts.values()}) == 3
    return texts


def test_greedy_texts_are_those_of_merged_weights(adapters: dict[str, Path], expected: dict[str, list[int]]) -> None:
    weights = read_safetensors(TINY / "model.safetensors")
    for name, directory in adapters.items():
        merged = ReferenceModel(Config.from_directory(TINY), adapted(weights, directory), TINY)
        logits = merged.logits([*LETTER, *expected[name][:-1]])[len(LETTER) - 1 :]
        logits[:, [4096, 4098]] = -np.inf
        assert logits.argmax(1).tolist() == expected[name]


def test_a_prefix_of_one_adapter_is_not_used_by_another(model: Model, expected: dict[str | None, list[int]]) -> None:
    for name in (*NAMES, *NAMES):
        stream = model.stream(LETTER, adapter=name, **GREEDY)
        assert stream.completion().ids == expected[name]
    for name in NAMES:
        assert model.generate(LETTER, adapter=name, **GREEDY).usage.cached_tokens == len(LETTER) - 1
    model.prefixes.clear()
    assert model.generate(LETTER, adapter="a", **GREEDY).usage.cached_tokens == 0
    for name in ("b", None):
        assert model.generate(LETTER, adapter=name, **GREEDY).usage.cached_tokens == 0


def test_one_batch_has_texts_with_and_without_adapters(model: Model, expected: dict[str | None, list[int]]) -> None:
    """They begin alike, so whoever took another's keys and values would write something else."""
    batch = Batch(model)
    order = ["a", None, "b", "a", "b", None, "a"]
    streams = [Stream(model, LETTER, batch=batch, adapter=name, **GREEDY) for name in order]
    for name, stream in zip(order, streams, strict=True):
        assert stream.completion().ids == expected[name], name
    cached = [stream.usage.cached_tokens for stream in streams]
    assert cached[:3] == [0, 0, 0]
    assert min(cached[3:]) == len(LETTER) - 1


def test_files_of_prefixes_belong_to_the_adapter_not_to_its_name(
    tiny: Callable[[int], Path], adapters: dict[str, Path], expected: dict[str | None, list[int]], tmp_path: Path
) -> None:
    a, b = adapters["a"], adapters["b"]
    cached = {}
    for run, given in enumerate(({"a": a}, {"a": b}, {"other": a, "b": b})):
        with load(tiny(16), threads=2, adapters=given, prefix_cache=tmp_path) as model:
            for name, path in given.items():
                done = model.generate(LETTER, adapter=name, **GREEDY)
                assert done.ids == expected["a" if path == a else "b"]
                cached[run, name] = done.usage.cached_tokens
    known = len(LETTER) - 1
    assert cached == {(0, "a"): 0, (1, "a"): 0, (2, "other"): known, (2, "b"): known}
    with load(tiny(16), threads=2, prefix_cache=tmp_path) as model:
        assert model.generate(LETTER, **GREEDY).usage.cached_tokens == 0


def test_a_session_computes_anew_what_another_adapter_has_computed(
    model: Model, expected: dict[str | None, list[int]]
) -> None:
    session = Session(model)
    for name in ("a", None, "b", "b", "a"):
        assert session.stream(LETTER, adapter=name, **GREEDY).completion().ids == expected[name]
        assert session.ids == LETTER + expected[name]
    session.prefill(LETTER, adapter="b")
    assert session.continue_(**GREEDY).completion().ids == expected["b"]
    fork = session.fork()
    assert fork.continue_(**GREEDY).usage.cached_tokens == len(fork.ids) - 1
    with pytest.raises(npqwen.OptionError, match="unknown adapter 'c'; the model was loaded with a, b"):
        session.stream(LETTER, adapter="c")
    assert session.ids == LETTER + expected["b"]
    session.prefill(LETTER[:200], adapter="a")
    logits = session.append(LETTER[200:])
    np.testing.assert_array_equal(logits, model.logits(LETTER, adapter="a")[-1])


def test_saved_sessions_come_back_with_their_adapter(
    tiny: Callable[[int], Path],
    adapters: dict[str, Path],
    model: Model,
    expected: dict[str | None, list[int]],
    tmp_path: Path,
) -> None:
    session = Session(model)
    session.prefill(LETTER, adapter="a")
    session.save(tmp_path / "a")
    session.prefill(LETTER)
    session.save(tmp_path / "none")
    with load(tiny(16), threads=2, adapters={"b": adapters["b"], "renamed": adapters["a"]}, prefix_memory=0) as other:
        session = Session.load(other, tmp_path / "a")
        assert session.cache.length == len(LETTER)
        stream = session.continue_(**GREEDY)
        assert stream.completion().ids == expected["a"]
        assert stream.usage.cached_tokens == len(LETTER) - 1
        assert Session.load(other, tmp_path / "none").continue_(**GREEDY).completion().ids == expected[None]
    with load(tiny(16), threads=2, adapters={"a": adapters["b"]}) as other, pytest.raises(
        npqwen.FormatError, match="was computed with the adapter 'a', which this model lacks; load the model with that"
    ):
        Session.load(other, tmp_path / "a")
    with load(tiny(16), threads=2) as other, pytest.raises(npqwen.FormatError, match="was computed with the adapter"):
        Session.load(other, tmp_path / "a")


@pytest.mark.parametrize("name", NAMES)
def test_draft_tokens_change_no_text_with_an_adapter(plain: Model, name: str | None) -> None:
    prompt = plain.tokenizer.encode("one two three four five " * 12)
    options = {**GREEDY, "max_tokens": 40, "adapter": name}
    slow = plain.generate(prompt, speculation=False, **options)
    fast = plain.generate(prompt, speculation=True, **options)
    assert fast.ids == slow.ids
    assert fast.usage.drafted_tokens > 0


def test_a_draft_model_drafts_without_the_adapter(
    tiny: Callable[[int], Path], adapters: dict[str, Path], expected: dict[str | None, list[int]]
) -> None:
    with load(tiny(16), threads=2, adapters=adapters, draft=tiny(4)) as model:
        assert model.draft is not None
        assert len(model.draft.adapters) == 0
        for name in NAMES:
            assert model.generate(LETTER, speculation=True, adapter=name, **GREEDY).ids == expected[name]


def test_chats_conversations_and_scores_take_an_adapter(model: Model, plain: Model) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "thinking": False}
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    expected = {name: plain.chat(question, adapter=name, **options).text for name in NAMES}
    assert len(set(expected.values())) == 3
    conversation = model.conversation(adapter="a", **options)
    assert conversation.send("What is 17 + 25?").text == expected["a"]
    for name in ("a", "b"):
        assert model.conversation(**options).send("What is 17 + 25?", adapter=name).text == expected[name]
        assert model.chat(question, adapter=name, **options).text == expected[name]
        both = model.chat(question, n=2, adapter=name, **options)
        assert [reply.text for reply in both] == [expected[name]] * 2
        assert model.chat_batch([question, question], adapter=name, **options)[1].text == expected[name]
    scores = {name: model.score(LETTER, " the", adapter=name).logprob for name in NAMES}
    assert len(set(scores.values())) == 3
    ids = model.tokenizer.encode(" the")
    logits = model.logits(LETTER, adapter="b")[-1].astype(np.float64)
    found = logits[ids[0]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert len(ids) == 1
    assert abs(scores["b"] - found) < 1e-4


def test_a_cache_is_run_with_the_adapter_it_was_made_for(model: Model, expected: dict[str | None, list[int]]) -> None:
    cache = model.new_cache(adapter="a")
    assert Stream(model, LETTER, cache=cache, **GREEDY).completion().ids == expected["a"]
    with pytest.raises(npqwen.OptionError, match="adapter is 'b', but the cache was computed with a; give it a cache"):
        Stream(model, [*LETTER, *expected["a"], 3], cache=cache, adapter="b")
    with pytest.raises(npqwen.OptionError, match="the cache was computed with none"):
        Stream(model, LETTER, cache=model.new_cache(), adapter="b")
    with pytest.raises(npqwen.OptionError, match="adapter is 3; it must be text"):
        model.generate(LETTER, adapter=3)  # type: ignore[call-overload]


def test_copies_of_an_adapter_share_prefixes(
    tiny: Callable[[int], Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(adapters["a"], tmp_path / "copy")
    with load(tiny(16), threads=2, adapters={"a": adapters["a"], "copy": copied, "half": f"{copied}:0.5"}) as model:
        assert isinstance(model.prefixes, Prefixes)
        first = model.generate(LETTER, adapter="a", **GREEDY)
        assert model.generate(LETTER, adapter="copy", **GREEDY).usage.cached_tokens == len(LETTER) - 1
        half = model.generate(LETTER, adapter="half", **GREEDY)
        assert half.usage.cached_tokens == 0
        assert half.ids != first.ids
