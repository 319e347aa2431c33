"""Adapters on the server: models of their own by name, in all APIs, in one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
from asgi import post
from checkpoints import TINY
from lora import change_tensors, write_adapter
from npqwen_quant import convert
from reference import read_safetensors
from retrieval_checkpoints import embedding_checkpoint
from serving import served

import npqwen
from npqwen.model import Model, load
from npqwen.server import app
from npqwen.server.model_names import ModelNames
from npqwen.server.models import Models
from npqwen.server.offer import Offer
from npqwen.server.settings import Settings

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
NAMES = (None, "one", "two")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    tensors = read_safetensors(TINY / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    seeds = {"one": 0, "two": 1}
    return {name: write_adapter(place / name, shapes, rank=8, size=2, seed=seed) for name, seed in seeds.items()}


@pytest.fixture(scope="module")
def model(tiny: Callable[[int], Path], adapters: dict[str, Path]) -> Iterator[Model]:
    with load(tiny(16), threads=2, adapters=adapters, name="tiny") as model:
        yield model


@pytest.fixture(scope="module")
def expected(model: Model) -> dict[str | None, str]:
    """Each adapter's answer."""
    found = {
        name: model.chat(QUESTION, adapter=name, temperature=0, max_tokens=10, thinking=False).text for name in NAMES
    }
    assert len(set(found.values())) == 3
    return found


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    with served(app(model, aliases={"gpt-sql": "tiny:two"})) as url:
        yield url


def answer(url: str, name: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        messages: Any = QUESTION
        reply = client.chat.completions.create(
            model=name, messages=messages, temperature=0, max_tokens=10, extra_body=off
        )
    assert reply.model == name
    return str(reply.choices[0].message.content)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("tiny", None),
        ("tiny:one", "one"),
        ("Tiny:two", "two"),
        ("two", "two"),
        ("one:latest", "one"),
        ("gpt-sql", "two"),
    ],
)
def test_the_models_name_chooses_the_adapter(
    url: str, expected: dict[str | None, str], name: str, adapter: str | None
) -> None:
    assert answer(url, name) == expected[adapter]


def test_all_apis_know_them(url: str, model: Model, expected: dict[str | None, str]) -> None:
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert [each["id"] for each in listed] == ["tiny", "tiny:one", "tiny:two", "gpt-sql"]
    assert httpx.get(f"{url}/v1/models/tiny:two").json()["id"] == "tiny:two"
    assert httpx.get(f"{url}/v1/models/tiny:three").status_code == 404
    text = model.generate("A part", temperature=0, max_tokens=8, adapter="two").text
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        done = client.completions.create(model="tiny:two", prompt="A part", temperature=0, max_tokens=8)
        assert done.choices[0].text == text
        said = client.responses.create(model="tiny:two", input="What is 17 + 25?", temperature=0, max_output_tokens=10)
        assert said.model == "tiny:two"
    with ollama.Client(host=url) as tags:
        assert [each.model for each in tags.list().models] == ["tiny", "tiny:one", "tiny:two", "gpt-sql"]
        options = {"temperature": 0, "num_predict": 10}
        reply = tags.chat("tiny:one", messages=QUESTION, think=False, options=options)
        assert reply.message.content == expected["one"]
        assert tags.show("tiny:one").modelinfo is not None
    body = {"model": "tiny:two", "messages": QUESTION, "max_tokens": 10, "temperature": 0}
    message = httpx.post(f"{url}/v1/messages", json=body | {"thinking": {"type": "disabled"}}).json()
    assert (message["model"], message["content"][0]["text"]) == ("tiny:two", expected["two"])


def test_requests_with_different_adapters_share_passes(url: str, expected: dict[str | None, str]) -> None:
    async def ask(client: httpx.AsyncClient, name: str) -> str:
        body = {
            "model": name,
            "messages": QUESTION,
            "temperature": 0,
            "max_tokens": 10,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        reply = await client.post(f"{url}/v1/chat/completions", json=body)
        return str(reply.json()["choices"][0]["message"]["content"])

    async def everything(names: list[str]) -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(ask(client, name) for name in names))

    names = ["tiny:one", "tiny", "tiny:two"] * 4
    known = {"tiny:one": expected["one"], "tiny": expected[None], "tiny:two": expected["two"]}
    assert asyncio.run(everything(names)) == [known[name] for name in names]


def test_an_offer_is_loaded_with_its_adapters(
    tiny: Callable[[int], Path], adapters: dict[str, Path], expected: dict[str | None, str]
) -> None:
    offer = Offer.of(tiny(16), "m", threads=2, adapters=adapters)
    weights = sum(path.stat().st_size for path in (adapters["one"] / "adapter_model.safetensors",) * 2)
    assert offer.loaded_bytes == offer.weight_bytes + weights
    with served(app(offer)) as url:
        assert [each["id"] for each in httpx.get(f"{url}/v1/models").json()["data"]] == ["m", "m:one", "m:two"]
        assert answer(url, "m:two") == expected["two"]
        assert answer(url, "m") == expected[None]


def test_an_offer_with_an_adapter_of_another_model_is_refused_at_once(
    tiny: Callable[[int], Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    shapes = {"model.layers.0.self_attn.q_proj.weight": (512, 128)}
    wrong = write_adapter(tmp_path / "wrong", shapes)
    with pytest.raises(npqwen.CheckpointError, match="but the model's is"):
        Offer.of(tiny(16), "m", adapters={"wrong": wrong})
    change_tensors(wrong, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": None})
    with pytest.raises(npqwen.CheckpointError, match="only one of the two factors"):
        Offer.of(tiny(16), "m", adapters={"wrong": wrong})


def test_vectors_and_scores_are_not_computed_as_if_there_were_no_adapter(
    tmp_path: Path, adapters: dict[str, Path]
) -> None:
    convert(embedding_checkpoint(tmp_path / "embedding"), tmp_path / "vectors", bits=16)
    with pytest.raises(npqwen.OptionError, match="vectors is not a language model, and only these use adapters"):
        Offer.of(tmp_path / "vectors", "vectors", adapters=adapters)
    with load(tmp_path / "vectors", threads=1, adapters=adapters) as model:
        served = app(model)
        reply = post(served, "/v1/embeddings", {"model": "vectors:one", "input": "Hi"})
        assert reply.status == 400
        assert reply.json["error"]["message"].endswith("without adapters; request vectors instead")
        assert post(served, "/v1/embeddings", {"model": "vectors", "input": "Hi"}).status == 200


def test_names_of_adapters() -> None:
    names = ModelNames(["a/m", "b"], {"x": "a/m:sql"}, {"a/m:sql": "sql", "a/m:both": "both", "b:both": "both"})
    for name in ("a/m:sql", "m:sql", "sql", "x", "SQL"):
        assert names.find(name) == "a/m:sql"
    assert names.find(None) == "a/m"
    assert names.find("b:both") == "b:both"
    for name in ("both", "a/m:none", "none"):
        with pytest.raises(npqwen.ModelNotFoundError, match="is not served; there are a/m, b, a/m:sql"):
            names.find(name)


def test_statistics_count_a_model_once(model: Model) -> None:
    async def look() -> tuple[list[str], list[str]]:
        models = Models(model, settings=Settings())
        found = [state.name for state in models.states], [state.name for state in models.offered]
        await models.close()
        return found

    assert asyncio.run(look()) == (["tiny"], ["tiny", "tiny:one", "tiny:two"])
