"""The draft layer of hybrids (multi-token prediction): its logits against torch, and its conversion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hybrids import add_draft_layer, hybrid_checkpoint
from npqwen_quant import convert
from npqwen_quant.conversion import update

from npqwen.engine.draft_layer import DraftLayer
from npqwen.engine.hidden_tail import KEPT, HiddenTail
from npqwen.engine.piece import Piece
from npqwen.errors import CheckpointError, FormatError, OptionError
from npqwen.format.safetensors import read_header
from npqwen.model import Model, load
from npqwen.reports.info import describe, inspect

TOLERANCE = 1e-3
_DATA = Path(__file__).parents[1] / "data"
TRAINED = np.load(_DATA / "mtp.npz")
MIXTURES = np.load(_DATA / "draft_layers.npz")
CHAIN = 3


def layer_of(model: Model) -> DraftLayer:
    layer = model.draft_layer
    assert layer is not None
    return layer


def states_of(model: Model, ids: np.ndarray) -> np.ndarray:
    """The model's hidden states of a text, before the final norm."""
    cache = model.new_cache()
    cache.tail = HiddenTail(model.config.hidden_size)
    model.forward(ids, cache)
    states: np.ndarray = cache.tail.rows(0, len(ids)).copy()
    return states


def logits_of(model: Model, ids: np.ndarray, states: np.ndarray, normed: bool) -> tuple[np.ndarray, np.ndarray, Any]:
    """The draft layer's logits after all tokens but the first, in pieces of several sizes: which rows of states those
    belong to, and the logits; then its last state, its cache and the array of its last logits."""
    cache, found, at = layer_of(model).new_cache(), [], 1
    out = np.empty((1, model.config.vocab_size), np.float32)
    own = np.empty(0, np.float32)
    for size in (1, 5, 1, 1, 40, *[1] * len(ids)):
        part = slice(at, min(len(ids), at + size))
        if part.start == len(ids):
            break
        own = layer_of(model).run(ids[part], states[part.start - 1 : part.stop - 1], cache, out, normed=normed)
        found.append((part.stop - 2, out[0].copy()))
        at = part.stop
    assert cache.length == len(ids) - 1
    return np.array([row for row, _ in found]), np.array([logits for _, logits in found]), (own, cache, out)


@pytest.mark.parametrize("normed", [False, True])
def test_logits_and_chained_draft_tokens_of_torch(hybrid: Callable[[str, int], Path], normed: bool) -> None:
    ids, columns, name = TRAINED["ids"], TRAINED["columns"], "after" if normed else "before"
    with load(hybrid("mtp", 16), threads=2) as model:
        states = states_of(model, ids)
        rows, logits, (own, cache, out) = logits_of(model, ids, states, normed)
        assert np.abs(logits[:, columns] - TRAINED[name][rows]).max() < TOLERANCE
        draft_tokens = []
        for _ in range(CHAIN):
            draft_tokens.append(int(out[0].argmax()))
            own = layer_of(model).run(draft_tokens[-1:], own[None], cache, out, normed=normed, chained=True)
        assert draft_tokens == TRAINED[f"{name}-draft_tokens"].tolist()
        assert np.abs(out[0, columns] - TRAINED[f"{name}-chained"]).max() < TOLERANCE
        part = np.empty((1, 1024), np.float32)
        cache.truncate(len(ids) - 2)
        layer_of(model).run(ids[-1:], states[-2:-1], cache, part, normed=normed)
        assert np.array_equal(part[0], logits[-1][:1024])


@pytest.mark.parametrize("name", ["next", "qwen35-moe"])
def test_a_mixtures_draft_layer_is_one(hybrid: Callable[[str, int], Path], name: str) -> None:
    ids, columns = MIXTURES["ids"], MIXTURES["columns"]
    with load(hybrid(f"{name}+draft", 16), threads=2) as model:
        assert model.config.mtp_num_hidden_layers == 1
        rows, logits, _ = logits_of(model, ids, states_of(model, ids), True)
    assert np.abs(logits[:, columns] - MIXTURES[name][rows]).max() < TOLERANCE


def test_states_are_those_of_the_pass_they_came_from(hybrid: Callable[[str, int], Path]) -> None:
    ids = np.tile(TRAINED["ids"], 6)[:700].astype(np.int64)
    with load(hybrid("mtp", 16), threads=1) as model:
        first = model.new_cache()
        first.tail = HiddenTail(model.config.hidden_size)
        model.forward(ids[:600], first)
        assert first.tail.end == 600
        assert first.tail.first <= 600 - KEPT
        want = states_of(model, ids[:20])
        other = model.new_cache()
        other.reserve(20)
        other.tail = HiddenTail(model.config.hidden_size)
        first.reserve(3)
        wrong = np.array([ids[600], 7, 7])
        model.forward_pieces([Piece(wrong, first, 3, 2), Piece(ids[:20], other, 1)])
        assert np.array_equal(other.tail.rows(0, 20), want)
        first.retract(2)
        assert first.fork().tail is None
        model.forward(ids[601:603], first)  # in place of the wrong ones
        assert first.tail.end == 603
        again = model.new_cache()
        again.tail = HiddenTail(model.config.hidden_size)
        model.forward(ids[:603], again)
        assert np.array_equal(again.tail.rows(599, 603), first.tail.rows(599, 603))


def test_a_tail_keeps_the_latest_states() -> None:
    tail, at, random = HiddenTail(3), 0, np.random.default_rng(0)
    text = random.standard_normal((4000, 3)).astype(np.float32)
    while at < 3000:
        count = int(random.choice([1, 2, 7, 100, 255, 256, 600]))
        tail.add(at, text[at : at + count])
        at += count
        assert tail.end == at
        assert at - tail.first >= min(at, KEPT // 2)
        assert np.array_equal(tail.rows(tail.first, at), text[tail.first : at])
        at -= int(random.integers(0, min(5, at)))  # draft tokens that were wrong
    tail.add(at + 10, text[:2])  # another text
    assert (tail.first, tail.end) == (at + 10, at + 12)


def test_what_cannot_be_run_is_refused(hybrid: Callable[[str, int], Path]) -> None:
    out, ids = np.zeros((1, 4128), np.float32), np.array([5, 6])
    with load(hybrid("mtp", 4), threads=1) as model:
        states, cache = np.zeros((2, 64), np.float32), layer_of(model).new_cache()
        wrong_states: list[Any] = [states[:1], states[:, :60], states.astype(np.float64)]
        for wrong in wrong_states:
            with pytest.raises(OptionError, match=r"states must be float32 \(2, 64\)"):
                layer_of(model).run(ids, wrong, cache, out)
        wrong_arrays: list[Any] = [out[0], out[:, :4120], out[:, ::2], out.astype(np.float64)]
        for array in wrong_arrays:
            with pytest.raises(OptionError, match="out must be"):
                layer_of(model).run(ids, states, cache, array)
        with pytest.raises(OptionError, match="draft layer\'s new_cache"):
            layer_of(model).run(ids, states, model.new_cache(), out)
        with pytest.raises(OptionError, match="another model"):
            model.forward(ids, cache)
        assert cache.length == 0
    with load(hybrid("qwen35", 4), threads=1) as model:
        assert model.draft_layer is None


@pytest.mark.parametrize("missing", ["mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.k_norm.weight"])
def test_a_draft_layer_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    add_draft_layer(hybrid_checkpoint("qwen35", tmp_path / "source"), without=missing)
    with pytest.raises(CheckpointError, match=f"no tensor {missing}"):
        convert(tmp_path / "source", tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()


def test_the_tensors_decide_whatever_the_config_says(tmp_path: Path) -> None:
    source = hybrid_checkpoint("qwen35", tmp_path / "source")
    convert(source, tmp_path / "plain", bits=4)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "lost", bits=4)  # as of models that were trained further
    assert json.loads((tmp_path / "lost" / "config.json").read_text())["mtp_num_hidden_layers"] == 0
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "lost")]
    assert files[0].read_bytes() == files[1].read_bytes()
    converted = tmp_path / "plain" / "config.json"
    converted.write_text(json.dumps(json.loads(converted.read_text()) | {"mtp_num_hidden_layers": 1}))
    with pytest.raises(FormatError, match=r"tensor mtp.pre_fc_norm_embedding.weight is missing"):
        load(tmp_path / "plain", threads=1)
    update(tmp_path / "lost", source, tmp_path / "updated")
    load(tmp_path / "updated", threads=1).close()
    config["text_config"]["mtp_num_hidden_layers"] = 2
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mtp_num_hidden_layers 2 is not supported, only 0 and 1"):
        convert(source, tmp_path / "two", bits=4)


def test_other_tensors_are_the_same_with_a_draft_layer_and_info_names_it(hybrid: Callable[[str, int], Path]) -> None:
    plain, both = hybrid("next", 4), hybrid("next+draft", 4)
    stored = []
    for path in (plain, both):
        with open(path / "model.safetensors", "rb") as file:
            header = read_header(file)
            data = {}
            for name, tensor in header.tensors.items():
                file.seek(tensor.offset)
                data[name] = file.read(tensor.nbytes)
        stored.append(data)
    assert stored[0] == {name: data for name, data in stored[1].items() if not name.startswith("mtp.")}
    assert len(stored[1]) > len(stored[0])
    info = inspect(both)
    assert info.weights == sum(info.parts.values()) == sum(map(len, stored[1].values()))
    assert info.parts["draft layer"] == info.weights - inspect(plain).weights
    assert "draft layer" in describe(info)
    assert "draft layer" not in describe(inspect(plain))
