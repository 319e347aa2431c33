"""Embeddings and scores by the server: with the openai and ollama packages, and as Jina's and Cohere's clients ask."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest
from npqwen_quant import convert
from retrieval_checkpoints import DEFINITIONS, INSTRUCTION, QUERIES, embedding_checkpoint, reranker_checkpoint
from serving import Runs, served, wait_until

import npqwen
from npqwen.model import load
from npqwen.server import app
from npqwen.server.offer import Offer

TEXTS = [text for text in DEFINITIONS if 0 < len(text) < 1000]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[npqwen.Model, npqwen.Model]]:
    """An embedding model and a reranker."""
    place = tmp_path_factory.mktemp("retrieval")
    convert(embedding_checkpoint(place / "embedding"), place / "vectors", bits=8)
    convert(reranker_checkpoint(place / "reranker"), place / "judge", bits=8)
    with load(place / "vectors", threads=1, context=512) as embedder, load(place / "judge", threads=1) as reranker:
        yield embedder, reranker


@pytest.fixture(scope="module")
def url(models: tuple[npqwen.Model, npqwen.Model], tiny_model: npqwen.Model) -> Iterator[str]:
    """The address of a server with both, and with a language model."""
    with served(app(tiny_model, *models)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def embedder(models: tuple[npqwen.Model, npqwen.Model]) -> npqwen.Model:
    return models[0]


@pytest.fixture
def reranker(models: tuple[npqwen.Model, npqwen.Model]) -> npqwen.Model:
    return models[1]


def vectors(answer: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return np.array([one.embedding for one in answer.data], np.float32)


def refused(url: str, path: str, body: Any) -> str:
    response = httpx.post(f"{url}{path}", json=body)
    assert response.status_code == 400, response.text
    message = response.json()["error"]
    return message if isinstance(message, str) else str(message["message"])


def test_the_openai_package_gets_the_library_s_vectors(client: openai.OpenAI, embedder: npqwen.Model) -> None:
    expected = embedder.embed(TEXTS)
    for encoding in ("float", "base64", openai.omit):  # the package's own choice is base64, which it decodes
        answer = client.embeddings.create(model="vectors", input=TEXTS, encoding_format=encoding)
        if encoding == "base64":
            raw: Any = [base64.b64decode(str(one.embedding)) for one in answer.data]
            np.testing.assert_array_equal(np.array([np.frombuffer(data, "<f4") for data in raw]), expected)
        else:
            np.testing.assert_array_equal(vectors(answer), expected)
        assert answer.usage.prompt_tokens == sum(len(embedder.tokenizer.encode(text)) + 1 for text in TEXTS)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens
        assert (answer.object, answer.model) == ("list", "vectors")


def test_input_is_a_text_texts_token_ids_or_lists_of_them(client: openai.OpenAI, embedder: npqwen.Model) -> None:
    ids = [embedder.tokenizer.encode(text) for text in TEXTS[:3]]
    expected = embedder.embed(TEXTS[:3])
    np.testing.assert_array_equal(vectors(client.embeddings.create(model="vectors", input=ids)), expected)
    for one in (TEXTS[0], ids[0]):
        np.testing.assert_array_equal(vectors(client.embeddings.create(model="vectors", input=one)), expected[:1])


def test_an_empty_input_is_refused_as_by_openai(client: openai.OpenAI) -> None:
    for input, message in (("", "input is empty"), (["a", ""], r"input\[1\] is empty")):
        with pytest.raises(openai.BadRequestError, match=message) as error:
            client.embeddings.create(model="vectors", input=input)
        assert error.value.param == "input"


def test_dimensions_and_an_instruction(client: openai.OpenAI, embedder: npqwen.Model) -> None:
    answer = client.embeddings.create(model="vectors", input=TEXTS, dimensions=64)
    np.testing.assert_array_equal(vectors(answer), embedder.embed(TEXTS, dimensions=64))
    answer = client.embeddings.create(
        model="vectors", input=list(QUERIES), extra_body={"instruction": INSTRUCTION}
    )
    np.testing.assert_array_equal(vectors(answer), embedder.embed(list(QUERIES), INSTRUCTION))


def test_a_text_that_is_too_long_is_refused_as_by_openai_unless_it_may_be_cut(
    client: openai.OpenAI, embedder: npqwen.Model
) -> None:
    long = "river winter " * 400
    with pytest.raises(openai.BadRequestError, match=r"input\[1\] has .* tokens; .* room for 511") as error:
        client.embeddings.create(model="vectors", input=["a", long])
    assert error.value.code == "context_length_exceeded"
    answer = client.embeddings.create(model="vectors", input=long, extra_body={"truncate": True})
    np.testing.assert_array_equal(vectors(answer)[0], embedder.embed(long))


def test_without_a_name_the_first_model_for_the_task_answers(url: str, embedder: npqwen.Model) -> None:
    answer = httpx.post(f"{url}/v1/embeddings", json={"input": "a"}).json()
    assert answer["model"] == embedder.name
    np.testing.assert_array_equal(np.array(answer["data"][0]["embedding"], np.float32), embedder.embed("a"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input is missing"),
        ({"input": []}, "input is []; it must be text, a list of texts, token ids, or a list of lists of token ids"),
        ({"input": ["a", 3]}, "it must be text, a list of texts"),
        ({"input": [[1], []]}, "input[1] is empty; send text or token ids"),
        ({"input": [4128]}, "input[0] has token id 4128; the vocabulary is 0 to 4127"),
        ({"input": ["a"] * 2049}, "input has 2049 prompts; at most 2048 are possible"),
        ({"input": "a", "dimensions": 8}, "dimensions is 8; it must be a whole number from 32 to 256"),
        ({"input": "a", "dimensions": "64"}, "dimensions is '64'"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format is 'int8'; it must be one of float, base64"),
        ({"input": "a", "model": "tiny-qwen3-16"}, "is not an embedding model"),
        ({"input": "a", "model": "judge"}, "judge is a reranker, which judges documents; use rerank with it"),
    ],
)
def test_impossible_embeddings_are_refused_in_words(url: str, body: dict[str, Any], message: str) -> None:
    assert message in refused(url, "/v1/embeddings", {"model": "vectors", **body})


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank", "/v1/reranking"])
def test_scores_come_sorted_with_indices(url: str, path: str, reranker: npqwen.Model) -> None:
    body = {"model": "judge", "query": QUERIES[0], "documents": TEXTS}
    answer = httpx.post(f"{url}{path}", json=body).json()
    expected = reranker.rerank(QUERIES[0], TEXTS)
    assert [result["index"] for result in answer["results"]] == list(expected.order)
    found = [result["relevance_score"] for result in answer["results"]]
    assert found == [float(expected.scores[index]) for index in expected.order]
    assert "document" not in answer["results"][0]
    assert answer["model"] == "judge"
    tokens = sum(map(len, reranker.reranker.ids(QUERIES[0], TEXTS, None)))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_the_best_documents_with_their_texts(url: str, reranker: npqwen.Model) -> None:
    documents = [{"text": text} for text in TEXTS]
    body = {"query": "q", "documents": documents, "top_n": 2, "return_documents": True, "instruction": INSTRUCTION}
    answer = httpx.post(f"{url}/v1/rerank", json=body).json()
    best = reranker.rerank("q", TEXTS, INSTRUCTION).order[:2]
    assert [(result["index"], result["document"]) for result in answer["results"]] == [
        (index, {"text": TEXTS[index]}) for index in best
    ]
    assert len(httpx.post(f"{url}/v1/rerank", json={**body, "top_n": 99}).json()["results"]) == len(TEXTS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"documents": ["a"]}, "query is missing"),
        ({"query": "q"}, "documents is missing"),
        ({"query": "q", "documents": []}, "documents is empty; send at least one"),
        ({"query": "q", "documents": ["a", {"image": "b"}]}, "documents[1] is {'image': 'b'}; it must be text, or an"),
        ({"query": "q", "documents": ["a"] * 2049}, "documents has 2049 documents; at most 2048 are possible"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "top_n is 0; it must be a whole number, 1 or more"),
        ({"query": "river " * 3000, "documents": ["a"]}, "query and instruction take"),
        ({"query": "q", "documents": ["a"], "model": "vectors"}, "vectors is an embedding model, which does not judge"),
    ],
)
def test_impossible_rankings_are_refused_in_words(url: str, body: dict[str, Any], message: str) -> None:
    assert message in refused(url, "/v1/rerank", {"model": "judge", **body})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
        ("/api/chat", {"messages": [{"role": "user", "content": "hi"}], "stream": False}),
        ("/api/generate", {"prompt": "hi", "stream": False}),
    ],
)
def test_who_wants_text_of_them_is_told_what_they_do(url: str, path: str, body: dict[str, Any]) -> None:
    message = refused(url, path, {"model": "vectors", **body})
    assert message.startswith("vectors is an embedding model, which does not write text; use embed with it (/v1/embedd")
    assert "judge is a reranker, which judges documents" in refused(url, path, {"model": "judge", **body})


def test_the_ollama_package_gets_vectors(url: str, embedder: npqwen.Model) -> None:
    with ollama.Client(host=url) as client:
        answer = client.embed("vectors", TEXTS)
        np.testing.assert_array_equal(np.array(answer.embeddings, np.float32), embedder.embed(TEXTS))
        assert answer.prompt_eval_count == sum(len(embedder.tokenizer.encode(text)) + 1 for text in TEXTS)
        assert (answer.total_duration or 0) >= (answer.load_duration or 0) >= 0
        answer = client.embed("vectors", "a", dimensions=32)
        np.testing.assert_array_equal(np.array(answer.embeddings[0], np.float32), embedder.embed("a", dimensions=32))
        assert list(client.embed("vectors", "").embeddings) == []
        old = client.embeddings("vectors", "a")
        np.testing.assert_array_equal(np.array(old.embedding, np.float32), embedder.embed("a"))
        long = "river winter " * 400
        cut = client.embed("vectors", long).embeddings[0]
        np.testing.assert_array_equal(np.array(cut, np.float32), embedder.embed(long))
        with pytest.raises(ollama.ResponseError, match=r"has .* tokens"):
            client.embed("vectors", long, truncate=False)
        assert client.show("vectors").capabilities == ["embedding"]


def test_the_list_of_models_tells_them_from_language_models(url: str) -> None:
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    found = {model["id"]: model["capabilities"] for model in listed}
    assert (found["vectors"], found["judge"]) == (["embedding"], ["reranking"])
    assert {*found} - {"vectors", "judge"}
    assert all(found[name] == ["completion"] for name in {*found} - {"vectors", "judge"})


def test_ollama_s_names_of_them(tiny_model: npqwen.Model, embedder: npqwen.Model) -> None:
    offer = Offer.of(embedder.path, "Qwen/Qwen3-Embedding-0.6B", threads=1)
    with served(app(tiny_model, offer)) as url, ollama.Client(host=url) as client:
        assert len(client.embed("qwen3-embedding:0.6b", "a").embeddings[0]) == 256


def test_requests_at_once_get_their_own_vectors(url: str, embedder: npqwen.Model) -> None:
    found: dict[int, Any] = {}

    def ask(at: int) -> None:
        body = {"model": "vectors", "input": TEXTS[at:] + TEXTS[:at]}
        answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).json()
        found[at] = [one["embedding"] for one in answer["data"]]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(8):
        np.testing.assert_array_equal(np.array(found[at], np.float32), embedder.embed(TEXTS[at:] + TEXTS[:at]))


def test_a_query_is_answered_while_many_texts_are_read(url: str) -> None:
    many = {"model": "vectors", "input": ["river winter " * 200] * 2000, "truncate": True}
    ended: list[float] = []

    def ask() -> None:
        assert httpx.post(f"{url}/v1/embeddings", json=many, timeout=120).status_code == 200
        ended.append(time.monotonic())

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: b'running{model="vectors"} 1' in httpx.get(f"{url}/metrics").content)
    assert httpx.post(f"{url}/v1/embeddings", json={"model": "vectors", "input": "a"}, timeout=60).status_code == 200
    answered = time.monotonic()
    thread.join()
    assert answered < ended[0]


def test_texts_of_a_client_that_is_gone_are_not_read(url: str, runs: Runs) -> None:
    body = json.dumps({"model": "vectors", "input": ["river winter " * 200] * 2000, "truncate": True})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/embeddings", content=body, timeout=httpx.Timeout(30, read=0.5))
    wait_until(lambda: runs.all and runs.newest.cancelled)
    wait_until(lambda: b'running{model="vectors"} 0' in httpx.get(f"{url}/metrics").content)


def test_a_server_of_an_embedding_model_alone_starts_and_is_healthy(embedder: npqwen.Model) -> None:
    with served(app(embedder)) as url:
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx.post(f"{url}/tokenize", json={"content": "a river"}).json()["tokens"]
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == embedder.name
    assert Path(embedder.path).is_dir()
