"""`format` in ollama's API, with and without `think`: structure is guaranteed, and thinking is not changed by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

import npqwen

pytest.importorskip("llguidance")
NAME = "tiny-qwen3-16"
SUM = "What is 17 + 25?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=server) as client:
        yield client


def asked(client: ollama.Client, endpoint: str, stream: bool, **fields: Any) -> tuple[str, str]:
    """The text and the thinking of an answer."""
    options = {"seed": 1, "num_predict": 400}
    if endpoint == "chat":
        messages = [{"role": "user", "content": SUM}]
        answer: Any = client.chat(NAME, messages, stream=stream, options=options, **fields)  # type: ignore[call-overload]
        parts = [(part.message.content, part.message.thinking) for part in (answer if stream else [answer])]
    else:
        answer = client.generate(NAME, SUM, stream=stream, options=options, **fields)  # type: ignore[call-overload]
        parts = [(part.response, part.thinking) for part in (answer if stream else [answer])]
    return "".join(text or "" for text, _ in parts), "".join(thinking or "" for _, thinking in parts)


def follows(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"sum", "sure"} and 0 <= value["sum"] <= 99 and isinstance(value["sure"], bool)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("endpoint", ["chat", "generate"])
def test_without_thinking_the_format_is_obeyed_at_once(endpoint: str, stream: bool, client: ollama.Client) -> None:
    text, thinking = asked(client, endpoint, stream, think=False, format=SCHEMA)
    assert follows(text)
    assert thinking == ""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("endpoint", ["chat", "generate"])
@pytest.mark.parametrize("think", [True, None])
def test_a_format_does_not_turn_thinking_off(
    endpoint: str, stream: bool, think: bool | None, client: ollama.Client, tiny_model: npqwen.Model
) -> None:
    text, thinking = asked(client, endpoint, stream, think=think, format=SCHEMA)
    assert follows(text)
    assert thinking == tiny_model.chat(SUM, seed=1).reasoning  # the thought is the one without a format


def test_json_is_any_object(client: ollama.Client) -> None:
    text, _ = asked(client, "chat", False, think=False, format="json")
    assert text.lstrip().startswith("{")
    whole = client.chat(NAME, [{"role": "user", "content": SUM}], think=False, format="json", options={"seed": 1})
    if whole.done_reason == "stop":
        assert isinstance(json.loads(whole.message.content or ""), dict)


def test_raw_text_has_a_format_too(client: ollama.Client) -> None:
    answer = client.generate(NAME, "The answer:", raw=True, format=SCHEMA, options={"seed": 1})
    assert follows(answer.response or "")


def test_pydantic_schemas_give_objects(client: ollama.Client) -> None:
    import pydantic

    class Sum(pydantic.BaseModel):
        left: bool
        right: bool

    answer = client.chat(NAME, [{"role": "user", "content": SUM}], think=False, format=Sum.model_json_schema())
    assert isinstance(Sum.model_validate_json(answer.message.content or ""), Sum)


def test_a_schema_that_is_none_is_refused(server: str) -> None:
    body = {"prompt": SUM, "format": {"type": "no-such-type"}}
    reply = httpx.post(f"{server}/api/generate", json=body)
    assert reply.status_code == 400
    assert list(reply.json()) == ["error"]
