"""/api/tags, show, ps, version, and what this server does not do for ollama's clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import ollama
import pytest
from serving import served

import npqwen
from npqwen.server import app
from npqwen.server.offer import Offer


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=server) as client:
        yield client


def test_tags_list_the_models_on_offer(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    (found,) = client.list().models
    assert found.model == tiny_model.name
    assert found.size == sum(file.stat().st_size for file in tiny_model.path.glob("*.safetensors"))
    assert found.digest is not None
    assert len(bytes.fromhex(found.digest)) == 32
    assert found.modified_at is not None
    assert found.details is not None
    assert (found.details.family, found.details.quantization_level) == ("qwen3", "bf16")
    assert found.details.parameter_size == "4.99M"  # 4,122 x 256, 4 layers of 983,808, and 256


def test_show_tells_what_a_model_is_without_loading_it(tiny: Callable[[int], Path]) -> None:
    with served(app(Offer.of(tiny(4), "m", context=1024))) as url, ollama.Client(host=url) as client:
        found = client.show("m:latest")
        config = json.loads((tiny(4) / "config.json").read_text())
        info = found.modelinfo
        assert info is not None
        assert info["general.architecture"] == "qwen3"
        assert info["qwen3.context_length"] == 1024
        assert info["qwen3.block_count"] == config["num_hidden_layers"]
        assert info["qwen3.embedding_length"] == config["hidden_size"]
        assert found.capabilities == ["completion", "tools", "thinking"]
        assert found.template is not None
        assert "<|im_start|>" in found.template
        assert found.details is not None
        assert found.details.quantization_level == "int4"
        assert httpx.post(f"{url}/api/show", json={"name": "m"}).status_code == 200
        assert httpx.post(f"{url}/api/show", json={"name": "x"}).status_code == 404
        assert client.ps().models == []


def test_ps_lists_what_is_loaded(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    (found,) = client.ps().models
    assert (found.name, found.context_length, found.size_vram) == (tiny_model.name, tiny_model.context, 0)
    assert found.expires_at is not None
    assert found.expires_at.year > 2100


def test_the_version_is_new_enough_for_clients(server: str) -> None:
    version = httpx.get(f"{server}/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


def test_a_pull_of_what_is_there_succeeds(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    assert client.pull(tiny_model.name).status == "success"
    assert [part.status for part in client.pull(tiny_model.name, stream=True)] == ["success"]
    with pytest.raises(ollama.ResponseError, match="npqwen serve MODEL") as error:
        client.pull("llama3")
    assert error.value.status_code == 404


def test_what_is_not_here_says_what_to_do(client: ollama.Client, server: str) -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: client.push("m"), "huggingface_hub"),
        (lambda: client.create("m", from_="x"), "npqwen convert"),
        (lambda: client.copy("a", "b"), "--alias"),
        (lambda: client.delete("m"), "npqwen rm"),
    ]
    for call, advice in calls:
        with pytest.raises(ollama.ResponseError, match=advice) as error:
            call()
        assert error.value.status_code == 501
    assert httpx.head(f"{server}/api/blobs/sha256:00").status_code == 501


def test_the_asynchronous_client_works_too(server: str, tiny_model: npqwen.Model) -> None:
    async def main() -> str:
        text = ""
        messages = [{"role": "user", "content": "What is 17 + 25?"}]
        async with ollama.AsyncClient(host=server) as client:
            options = {"seed": 1}
            async for part in await client.chat(tiny_model.name, messages, think=False, stream=True, options=options):
                text += part.message.content or ""
        return text

    assert asyncio.run(main()) == "17 + 25 = 42"
