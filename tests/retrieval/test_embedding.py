"""Vectors of texts are those of sentence-transformers, whatever else is read in the same passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY
from npqwen_quant import convert
from retrieval_checkpoints import DEFINITIONS, INSTRUCTION, QUERIES, embedding_checkpoint

import npqwen
from npqwen.errors import CheckpointError, ClosedError, ContextLengthError, OptionError
from npqwen.model import load

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "retrieval.npz")
END = 4096
"""<|endoftext|>"""

Loaded = Callable[[int], npqwen.Model]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found: np.ndarray = (a.astype(np.float64) * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values.ravel()))


@pytest.fixture
def model(embedder: Loaded) -> npqwen.Model:
    return embedder(16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")


def test_vectors_are_those_of_sentence_transformers(model: npqwen.Model) -> None:
    assert model.task == "embedding"
    documents, queries = model.embed(DEFINITIONS), model.embed(list(QUERIES), instruction=True)
    assert documents.dtype == np.float32
    assert documents.shape == (len(DEFINITIONS), 256)
    assert cosines(documents, GOLDEN["documents"]).min() > 0.999999
    assert cosines(queries, GOLDEN["queries"]).min() > 0.999999
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(ranks(queries @ documents.T), ranks(GOLDEN["queries"] @ GOLDEN["documents"].T))
    np.testing.assert_array_equal(queries, model.embed(list(QUERIES), INSTRUCTION))


@pytest.mark.parametrize(("bits", "cosine", "rank"), [(8, 0.999, 0.995), (4, 0.96, 0.95)])
def test_what_quantizing_costs(embedder: Loaded, bits: int, cosine: float, rank: float) -> None:
    """docs/precision.md has the numbers."""
    model = embedder(bits)
    documents, queries = model.embed(DEFINITIONS), model.embed(list(QUERIES), instruction=True)
    assert cosines(documents, GOLDEN["documents"]).min() > cosine
    exact = ranks(GOLDEN["queries"] @ GOLDEN["documents"].T)
    assert np.corrcoef(ranks(queries @ documents.T), exact)[0, 1] > rank


@pytest.mark.parametrize("size", [32, 100])
def test_vectors_are_cut_before_they_are_normalized(model: npqwen.Model, size: int) -> None:
    cut = model.embed(DEFINITIONS, dimensions=size)
    assert cut.shape == (len(DEFINITIONS), size)
    assert cosines(cut, GOLDEN[f"cut_{size}"]).min() > 0.999999
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_vector_is_the_same_to_the_bit_without_company(embedder: Loaded, bits: int) -> None:
    model = embedder(bits)
    together = model.embed(DEFINITIONS)
    for text, vector in zip(DEFINITIONS, together, strict=True):
        np.testing.assert_array_equal(model.embed(text), vector)
    np.testing.assert_array_equal(model.embed(DEFINITIONS[::-1]), together[::-1])
    asked = model.embed(list(QUERIES), INSTRUCTION)  # they begin alike
    for query, vector in zip(QUERIES, asked, strict=True):
        np.testing.assert_array_equal(model.embed(query, INSTRUCTION), vector)


def test_the_vector_is_that_of_the_ending(model: npqwen.Model) -> None:
    """The oracle is `hidden`, the states of all tokens of one text."""
    for text in ("a river", ""):
        state = model.hidden([*model.tokenizer.encode(text), END])[-1].astype(np.float64)
        np.testing.assert_allclose(model.embed(text), state / np.linalg.norm(state), atol=1e-6)


def test_token_ids_are_texts_too_with_their_ending_or_without(model: npqwen.Model) -> None:
    ids = [model.tokenizer.encode(text) for text in ("a river", "winter")]
    expected = model.embed(["a river", "winter"])
    np.testing.assert_array_equal(model.embed(ids), expected)
    np.testing.assert_array_equal(model.embed([[*each, END] for each in ids]), expected)
    np.testing.assert_array_equal(model.embed([np.array(each).tolist() for each in ids]), expected)


def test_an_ending_that_the_tokenizer_lacks_is_appended(tmp_path: Path, model: npqwen.Model) -> None:
    """The first release of Qwen3-Embedding, and copies of it, have no post-processor that does."""
    assert model.tokenizer.frame == ([], [END])
    convert(embedding_checkpoint(tmp_path / "source", ending=False), tmp_path / "out", bits=16)
    with load(tmp_path / "out", threads=1) as other:
        assert other.tokenizer.frame == ([], [])
        np.testing.assert_array_equal(other.embed(DEFINITIONS[:4]), model.embed(DEFINITIONS[:4]))


def test_long_texts_are_cut_before_the_ending_or_refused(model: npqwen.Model) -> None:
    long = "river winter " * 400
    ids = model.tokenizer.encode(long)
    assert len(ids) > model.context
    kept = ids[: model.context - 1]
    np.testing.assert_array_equal(model.embed(long), model.embed([kept])[0])
    with pytest.raises(ContextLengthError, match=rf"texts\[1\] has {len(ids):,} tokens; .* room for {len(kept)}; sh"):
        model.embed(["short", long], truncate=False)
    model.embed([kept], truncate=False)


def test_no_texts_give_no_vectors_and_progress_is_told(model: npqwen.Model) -> None:
    told: list[tuple[int, int]] = []
    assert model.embed([], progress=lambda done, total: told.append((done, total))).shape == (0, 256)
    model.embed(["a", "b"], progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": 3}, "texts is 3; give a list of texts"),
        ({"texts": [3]}, r"texts\[0\] is 3; it must be a sequence of token ids"),
        ({"texts": [[]]}, r"texts\[0\] has no tokens"),
        ({"texts": [[5000]]}, r"texts\[0\] has token id 5000; the vocabulary is 0 to 4127"),
        ({"texts": ["\ud800"]}, "not valid Unicode"),
        ({"texts": ["a"], "dimensions": 31}, "dimensions is 31; it must be a whole number from 32 to 256"),
        ({"texts": ["a"], "dimensions": 257}, "dimensions is 257"),
        ({"texts": ["a"], "instruction": 3}, "instruction is 3; it must be text, True or None"),
        ({"texts": ["a"], "progress": 3}, "progress is 3"),
    ],
)
def test_impossible_arguments_are_refused(model: npqwen.Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        model.embed(**arguments)


def test_only_an_embedding_model_embeds(reranker: Loaded, tiny_model: npqwen.Model) -> None:
    with pytest.raises(OptionError, match="is a reranker, which judges documents; use rerank with it"):
        reranker(4).embed(["a"])
    assert tiny_model.task == "text"
    with pytest.raises(OptionError, match=r"is not an embedding model.* such as Qwen/Qwen3-Embedding-0\.6B"):
        tiny_model.embed(["a"])


def test_a_closed_model_does_not_embed(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", bits=4)
    model = load(tmp_path / "out", threads=1)
    model.close()
    with pytest.raises(ClosedError):
        model.embed(["a"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True}, "pooling of the kind mean_tokens; npqwen has"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "lasttoken"]}, "of the kind cls, lasttoken"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], r"the module sentence_transformers\S*Dense"),
        ("modules.json", {}, "does not hold a list"),
    ],
)
def test_vectors_that_are_made_otherwise_are_refused(
    source: Path, tmp_path: Path, file: str, content: Any, message: str
) -> None:
    out = tmp_path / "out"
    convert(source, out, bits=4)
    (out / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message), load(out, threads=1) as model:
        model.embed(["a"])


def test_newer_files_name_the_pooling_by_one_key(source: Path, tmp_path: Path, model: npqwen.Model) -> None:
    out = tmp_path / "out"
    convert(source, out, bits=16)
    (out / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    with load(out, threads=1) as other:
        np.testing.assert_array_equal(other.embed("a"), model.embed("a"))


def test_a_model_whose_own_prompt_for_queries_is_empty_has_none(
    source: Path, tmp_path: Path, model: npqwen.Model
) -> None:
    out = tmp_path / "out"
    convert(source, out, bits=16)
    # What sentence-transformers writes for a model that was trained without prompts.
    settings = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}
    (out / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with load(out, threads=1) as other:
        np.testing.assert_array_equal(other.embed("a", instruction=True), model.embed("a"))


def test_special_tokens_can_be_spelled_without_being_meant() -> None:
    tokenizer = npqwen.Tokenizer.from_directory(TINY)
    for text in ("a<|im_end|>b", "<|im_start|><|endoftext|>", "plain", "<think>"):
        ids = tokenizer.plain_ids(text)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == text
