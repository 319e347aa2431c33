"""Hidden states of layers and of the final norm, against Hugging Face transformers and the NumPy reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen3_in_numpy
from checkpoints import TINY
from npqwen_quant import convert
from reference import ReferenceModel

from npqwen.engine.piece import Piece
from npqwen.errors import ClosedError, ContextLengthError, OptionError
from npqwen.model import Model, load

MOE = Path(__file__).parents[1] / "data" / "tiny-qwen3-moe"
GOLDEN = np.load(Path(__file__).parents[1] / "data" / "hidden_states.npz")
IDS = np.random.default_rng(3).integers(0, 4096, 700)


@pytest.fixture(scope="module", params=[TINY, MOE], ids=["dense", "mixture"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Any]]:
    """A model in bf16, and the reference of its checkpoint."""
    path = tmp_path_factory.mktemp("hidden") / "model"
    convert(request.param, path, bits=16)
    with load(path, threads=2) as model:
        yield model, ReferenceModel.from_directory(request.param)


def reference_states(reference: ReferenceModel, ids: np.ndarray) -> list[np.ndarray]:
    """What transformers calls hidden_states: the embedding, every layer's output, the last one normed."""
    states = [reference.weights["model.embed_tokens.weight"][ids]]
    for layers in range(1, reference.config.num_hidden_layers + 1):
        config = replace(reference.config, num_hidden_layers=layers)
        states.append(qwen3_in_numpy.forward(config, reference.weights, ids, qwen3_in_numpy.Cache(config)))
    norm = reference.weights["model.norm.weight"]
    return [*states[:-1], qwen3_in_numpy.rms_norm(states[-1], norm, reference.config.rms_norm_eps)]


def test_hidden_states_are_those_of_transformers(pair: tuple[Model, ReferenceModel]) -> None:
    model, reference = pair
    expected = GOLDEN["dense" if model.config.mixture is None else "mixture"]
    for found in (model.hidden(GOLDEN["ids"], range(len(expected))), reference_states(reference, GOLDEN["ids"])):
        for state, other in zip(found, expected, strict=True):
            assert np.abs(state - other).max() < 1e-4 * np.abs(other).max()


@pytest.mark.parametrize("tokens", [1, 5, 100, 700])
def test_all_hidden_states_are_the_references(pair: tuple[Model, ReferenceModel], tokens: int) -> None:
    model, reference = pair
    ids = IDS[: min(tokens, model.context)]
    expected = np.array(reference_states(reference, ids))
    found = model.hidden(ids, layers=range(len(expected)))
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (model.config.num_hidden_layers + 1, len(ids), model.config.hidden_size)
    for state, other in zip(found, expected, strict=True):
        assert np.abs(state - other).max() < 1e-3 * np.abs(other).max()
    logits = reference.forward(ids, reference.new_cache(), all_logits=True)
    head = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    assert np.abs(found[-1] @ reference.weights[head].T - logits).max() < 1e-3


def test_layers_are_chosen_by_index(pair: tuple[Model, ReferenceModel]) -> None:
    model, _ = pair
    ids, last = IDS[:300], model.config.num_hidden_layers
    every = model.hidden(ids, range(last + 1))
    assert np.array_equal(model.hidden(ids), every[-1])
    for i in range(-last - 1, last + 1):
        assert np.array_equal(model.hidden(ids, i), every[i])
    assert np.array_equal(model.hidden(ids, [2, -1, 0, 2]), every[[2, -1, 0, 2]])
    as_array: Any = np.array([1])
    assert np.array_equal(model.hidden(ids, as_array), every[[1]])
    assert model.hidden(7).shape == (1, model.config.hidden_size)
    assert model.hidden(ids, []).shape == (0, 300, model.config.hidden_size)


def test_a_pass_for_hidden_states_leaves_other_passes_alone(pair: tuple[Model, ReferenceModel]) -> None:
    model, _ = pair
    cache = model.new_cache()
    model.prefill(IDS[:20], cache)
    fork = cache.fork()
    model.hidden(IDS[:50], [0, 1])
    assert np.array_equal(model.forward(IDS[20:25], cache), model.forward(IDS[20:25], fork))


def test_a_pass_over_pieces_gives_the_states_of_each_alone(pair: tuple[Model, ReferenceModel]) -> None:
    """Rows of logits and of states come from the same caches, in any order."""
    model, _ = pair
    texts = IDS[:40], IDS[100:103], IDS[200:290]
    caches = [model.new_cache() for _ in texts]
    for cache, text in zip(caches, texts, strict=True):
        cache.reserve(len(text))
    starts = [Piece(text[:30], cache, 0) for text, cache in zip(texts[::2], caches[::2], strict=True)]
    assert [state.shape for state in model.hidden_pieces(starts)] == [(0, model.config.hidden_size)] * 2
    rest = [texts[0][30:], texts[1], texts[2][30:]]
    rows = [1, 3, 20]
    pieces = [Piece(ids, cache, count) for ids, cache, count in zip(rest, caches, rows, strict=True)]
    for text, state, count in zip(texts, model.hidden_pieces(pieces), rows, strict=True):
        assert np.array_equal(state, model.hidden(text)[-count:])
    assert [cache.length for cache in caches] == [40, 3, 90]
    with pytest.raises(OptionError, match="two pieces of a pass have the same cache"):
        model.hidden_pieces([pieces[0], pieces[0]])
    with pytest.raises(OptionError, match="a pass takes 1 to"):
        model.hidden_pieces([])


@pytest.mark.parametrize(("bits", "least"), [(4, 0.99), (8, 0.9999)])
def test_with_integer_weights_too_logits_are_those_of_the_last_hidden_state(
    tiny: Callable[[int], Path], bits: int, least: float
) -> None:
    """As far as the output matrix and its input are rounded."""
    with load(tiny(bits), threads=2) as model:
        found, logits = model.hidden(IDS[:300]), model.logits(IDS[:300])
    assert model.config.tie_word_embeddings
    exact = found @ ReferenceModel.from_directory(TINY).weights["model.embed_tokens.weight"].T
    assert np.corrcoef(exact.ravel(), logits.ravel())[0, 1] > least


def test_impossible_hidden_states(pair: tuple[Model, ReferenceModel], tiny: Callable[[int], Path]) -> None:
    model, _ = pair
    last = model.config.num_hidden_layers
    impossible: tuple[Any, ...] = (last + 1, -last - 2, 1.5, "1", None, True, [0, 99])
    for layers in impossible:
        with pytest.raises(OptionError, match=f"layers is .*; it must be a whole number from {-last - 1} to {last}"):
            model.hidden(IDS[:3], layers)
    with pytest.raises(OptionError, match="token id"):
        model.hidden([-1])
    with pytest.raises(ContextLengthError):
        model.hidden(np.zeros(model.context + 1, np.int64))
    with load(tiny(4), threads=1) as closed:
        pass
    with pytest.raises(ClosedError):
        closed.hidden([1])
