"""POST /api/generate, by the ollama package: prompts, raw text, filling in, loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from serving import served, wait_until

import npqwen
from npqwen.server import app
from npqwen.server.offer import Offer

SUM = "What is 17 + 25?"


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=server) as client:
        yield client


def test_a_prompt_is_a_message_of_the_user(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    options = {"seed": 1}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SUM}]
    reply = tiny_model.chat(messages, seed=1)
    answer = client.generate(tiny_model.name, SUM, system="Be brief.", options=options)
    assert (answer.response, answer.thinking) == (reply.text, reply.reasoning)
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "stop", reply.usage.generated_tokens)
    assert answer.context is None
    parts = list(client.generate(tiny_model.name, SUM, system="Be brief.", options=options, stream=True))
    assert "".join(part.response or "" for part in parts) == reply.text
    assert "".join(part.thinking or "" for part in parts) == reply.reasoning
    assert parts[-1].prompt_eval_count == tiny_model.count_tokens(messages)
    assert client.generate(tiny_model.name, SUM, think=False, options=options).thinking is None


@pytest.mark.parametrize("stream", [True, False])
def test_raw_text_is_continued_without_a_template(
    stream: bool, client: ollama.Client, tiny_model: npqwen.Model
) -> None:
    prompt = f"<|im_start|>user\n{SUM}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    answer: Any = client.generate(  # type: ignore[call-overload]
        tiny_model.name, prompt, raw=True, stream=stream, options={"temperature": 0}
    )
    parts = list(answer) if stream else [answer]
    found = tiny_model.generate(prompt, temperature=0)
    assert "".join(part.response for part in parts) == found.text == "17 + 25 = 42"
    assert parts[-1].done_reason == "stop"
    assert parts[-1].prompt_eval_count == len(tiny_model.tokenizer.encode(prompt))
    with pytest.raises(ollama.ResponseError, match="num_ctx is 4"):
        client.generate(tiny_model.name, prompt, raw=True, options={"num_ctx": 4})


def test_a_suffix_is_filled_in_before(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    prompt = "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|>\n\nprint(add(1, 2))<|fim_middle|>"
    answer = client.generate(
        tiny_model.name, "def add(a, b):\n    ", suffix="\n\nprint(add(1, 2))",
        options={"temperature": 0, "num_predict": 8},
    )  # fmt: skip
    assert answer.response == tiny_model.generate(prompt, temperature=0, max_tokens=8).text
    assert answer.prompt_eval_count == len(tiny_model.tokenizer.encode(prompt))


def test_without_a_prompt_the_model_is_loaded_or_unloaded(tiny: Callable[[int], Path]) -> None:
    offers = [Offer.of(tiny(4), name, threads=1) for name in ("a", "b")]
    with served(app(*offers)) as url, ollama.Client(host=url) as client:
        assert client.ps().models == []
        loaded = client.generate("b", keep_alive="10m")
        assert (loaded.done, loaded.done_reason, loaded.response) == (True, "load", "")
        assert [model.name for model in client.ps().models] == ["b"]
        assert client.chat("a", keep_alive=-1).done_reason == "load"
        names = {model.name: model.expires_at for model in client.ps().models}
        assert list(names) == ["a", "b"]
        assert names["a"] is not None
        assert names["b"] is not None
        assert names["a"] > names["b"]
        assert client.generate("b", keep_alive=0).done_reason == "unload"
        assert [model.name for model in client.ps().models] == ["a"]
        # After an answer it goes by itself.
        client.generate("a", SUM, keep_alive=0, options={"num_predict": 2})
        wait_until(lambda: not client.ps().models)
        assert client.generate("a", SUM, options={"num_predict": 2}).done


@pytest.fixture(scope="module")
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server) as http:
        yield http


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"prompt": 1}, "prompt is 1"),
        ({"prompt": "x", "images": ["aGk="]}, "reads text only"),
        ({"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        ({"prompt": "x", "context": [1, 2]}, "/api/chat"),
        ({"prompt": "x", "raw": True, "system": "s"}, "system has no place"),
        ({"prompt": "x", "raw": True, "think": True}, "think has no effect"),
        ({"prompt": "x", "suffix": "y", "think": "high"}, "think has no effect"),
        ({"prompt": "x", "stream": "yes"}, "stream is 'yes'"),
        ({"prompt": "x", "options": []}, "options is []"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(body: dict[str, Any], problem: str, http: httpx.Client) -> None:
    reply = http.post("/api/generate", json=body)
    assert reply.status_code == 400
    assert problem in reply.json()["error"]


def test_neutral_values_are_fine(http: httpx.Client) -> None:
    body = {
        "prompt": SUM, "template": "", "context": [], "images": [], "suffix": "", "format": "", "raw": False,
        "system": "", "options": {"num_predict": 1, "num_ctx": 0, "tfs_z": 1, "repeat_last_n": 64}, "keep_alive": "5m",
    }  # fmt: skip
    assert http.post("/api/generate", json={**body, "stream": False}).json()["done"]
