"""Texts of a hybrid with LoRA adapters: no text uses keys, values or a recurrent state that another has computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import read_safetensors
from lora import write_adapter

import npqwen
from npqwen.generation.batch import Batch
from npqwen.generation.drafting import Drafting
from npqwen.generation.layer_drafter import LayerStatistics
from npqwen.generation.session import Session
from npqwen.generation.stream import Stream
from npqwen.model import Model, load

SOURCE = Path(__file__).parents[1] / "data" / "hybrid" / "mtp" / "model.safetensors"
LETTER = [int(id) for id in np.random.default_rng(3).integers(0, 4000, 300)]
BORDER = 290
"""Of LETTER: up to here a cache can go back to it."""
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16, "logit_bias": {4096: -np.inf, 4098: -np.inf}}
NAMES = (None, "a", "b")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, stored = tmp_path_factory.mktemp("adapters"), read_safetensors(SOURCE)
    shapes = {name: tensor.shape for name, tensor in stored.items() if name.startswith("model.layers.")}
    modules = ("q_proj", "o_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "down_proj")
    return {
        "a": write_adapter(place / "a", shapes, modules, rank=8),
        "b": write_adapter(place / "b", shapes, ("in_proj_qkv", "in_proj_a"), rank=4, seed=1, size=1),
    }


@pytest.fixture
def model(hybrid: Callable[[str, int], Path], adapters: dict[str, Path]) -> Iterator[Model]:
    with load(hybrid("mtp", 16), threads=2, adapters=adapters) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(hybrid: Callable[[str, int], Path], adapters: dict[str, Path]) -> dict[str | None, list[int]]:
    """The text after LETTER with each adapter, of the likeliest tokens by logits of whole texts."""
    found = {}
    with load(hybrid("mtp", 16), threads=2, adapters=adapters, prefix_memory=0) as plain:
        for name in NAMES:
            ids = list(LETTER)
            for _ in range(GREEDY["max_tokens"]):
                logits = plain.logits(ids, adapter=name)[-1]
                logits[[4096, 4098]] = -np.inf
                ids.append(int(logits.argmax()))
            found[name] = ids[len(LETTER) :]
    assert len({tuple(ids) for ids in found.values()}) == 3
    return found


def test_states_in_the_pool_belong_to_an_adapter(model: Model, expected: dict[str | None, list[int]]) -> None:
    for name in (*NAMES, *NAMES):
        assert model.generate(LETTER, adapter=name, **GREEDY).ids == expected[name]
    cached = {name: model.generate(LETTER, adapter=name, **GREEDY).usage.cached_tokens for name in NAMES}
    assert min(cached.values()) > 200
    model.prefixes.clear()
    assert model.generate(LETTER, adapter="a", **GREEDY).usage.cached_tokens == 0
    for name in ("b", None):
        assert model.generate(LETTER, adapter=name, **GREEDY).usage.cached_tokens == 0


def test_files_of_states_belong_to_an_adapter(
    hybrid: Callable[[str, int], Path], adapters: dict[str, Path], expected: dict[str | None, list[int]], tmp_path: Path
) -> None:
    a, b = adapters["a"], adapters["b"]
    cached = {}
    for run, given in enumerate(({"a": a}, {"a": b}, {"other": a, "b": b})):
        with load(hybrid("mtp", 16), threads=2, adapters=given, prefix_cache=tmp_path) as model:
            for name, path in given.items():
                done = model.generate(LETTER, adapter=name, **GREEDY)
                assert done.ids == expected["a" if path == a else "b"]
                cached[run, name] = done.usage.cached_tokens > 200
    assert cached == {(0, "a"): False, (1, "a"): False, (2, "other"): True, (2, "b"): True}
    with load(hybrid("mtp", 16), threads=2, prefix_cache=tmp_path) as model:
        done = model.generate(LETTER, **GREEDY)
        assert done.usage.cached_tokens == 0
        assert done.ids == expected[None]


def test_one_batch_has_texts_with_and_without_adapters(model: Model, expected: dict[str | None, list[int]]) -> None:
    batch = Batch(model)
    order = ["a", None, "b", "a", "b", None, "a"]
    streams = [Stream(model, LETTER, batch=batch, adapter=name, **GREEDY) for name in order]
    for name, stream in zip(order, streams, strict=True):
        assert stream.completion().ids == expected[name], name


def test_a_session_goes_back_to_states_of_its_adapter_only(
    model: Model, expected: dict[str | None, list[int]], tmp_path: Path
) -> None:
    session = Session(model)
    for name in ("a", None, "b", "b", "a"):
        assert session.stream(LETTER, adapter=name, **GREEDY).completion().ids == expected[name]
    session.prefill(LETTER[:BORDER], adapter="b")
    session.cache.keep_checkpoint()
    session.append(LETTER[BORDER:])
    session.save(tmp_path / "saved")
    assert session.cache.reusable(BORDER) == BORDER
    other = Session.load(model, tmp_path / "saved")
    for each in (session, other):
        logits = each.prefill([*LETTER[:BORDER], 7, 8], adapter="b")
        np.testing.assert_array_equal(logits, model.logits([*LETTER[:BORDER], 7, 8], adapter="b")[-1])
        logits = each.prefill([*LETTER[:BORDER], 7, 8], adapter="a")
        np.testing.assert_array_equal(logits, model.logits([*LETTER[:BORDER], 7, 8], adapter="a")[-1])
    with load(model.path, threads=2) as plain, pytest.raises(npqwen.FormatError, match="computed with the adapter 'b'"):
        Session.load(plain, tmp_path / "saved")


@pytest.mark.parametrize("name", NAMES)
def test_draft_tokens_of_the_draft_layer_change_no_text(
    model: Model, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_drafting", Drafting(model.passes, layer=LayerStatistics(model)))
    monkeypatch.setattr(Drafting, "remember", lambda self, ids: None)
    prompt = "<|im_start|>user\nWhat is 1 + 24?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    drafted = accepted = 0
    for seed in range(4):
        options: dict[str, Any] = {"max_tokens": 30, "seed": seed, "temperature": 0.5 * seed, "adapter": name}
        plain = model.generate(prompt, speculation=False, **options)
        speculative = model.generate(prompt, speculation=True, **options)
        assert speculative.ids == plain.ids
        assert model.generate(prompt, **options).ids == plain.ids
        drafted, accepted = drafted + speculative.usage.drafted_tokens, accepted + speculative.usage.accepted_tokens
    assert drafted > 20
    assert accepted > (20 if name is None else 0)
