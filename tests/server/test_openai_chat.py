"""POST /v1/chat/completions, by the openai package against a server: answers, streams, options."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

import npqwen
from npqwen.server.reasoning_fields import EFFORTS

SUM: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def streamed(chunks: Any, index: int = 0) -> dict[str, Any]:
    """A choice's message, put together from a stream as clients do."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "finish_reason": None, "roles": []}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index == index:
                assert message["finish_reason"] is None, "something follows the finish_reason"
                message["content"] += choice.delta.content or ""
                message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
                message["roles"] += [choice.delta.role] if choice.delta.role else []
                message["finish_reason"] = choice.finish_reason
    return message


def test_an_answer_is_that_of_the_library(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    answer = client.chat.completions.create(model=tiny_model.name, messages=SUM, seed=1)
    reply = tiny_model.chat(SUM, seed=1)
    choice = answer.choices[0]
    assert choice.message.content == reply.text == "17 + 25 = 42"
    assert choice.message.reasoning_content == reply.reasoning  # type: ignore[attr-defined]
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert answer.object == "chat.completion"
    assert answer.model == tiny_model.name
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == tiny_model.count_tokens(SUM)
    assert answer.usage.completion_tokens == reply.usage.generated_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    ids = tiny_model.tokenizer.encode(reply.reasoning)
    assert details.reasoning_tokens is not None
    assert len(ids) <= details.reasoning_tokens <= len(ids) + 2  # and the newlines around it


@pytest.mark.parametrize("page", ["README.md", "docs/server.md"])
def test_the_example_in_the_documentation_works_as_printed(
    page: str, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "OpenAI(" in code)
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", server), names)
    names["client"].close()
    assert re.fullmatch(r"17 \+ 25 = \d+\n", capsys.readouterr().out)


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="", messages=SUM, seed=1)
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="", messages=SUM, seed=1, **options))
    message = streamed(chunks)
    assert message["roles"] == ["assistant"]
    assert message["content"] == whole.choices[0].message.content
    assert message["reasoning_content"] == whole.choices[0].message.reasoning_content  # type: ignore[attr-defined]
    assert message["finish_reason"] == "stop"
    assert len(chunks) > 3
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [len(chunk.choices) for chunk in chunks] == (len(chunks) - 1) * [1] + [0]
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stream_has_no_usage_unless_it_is_requested(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="", messages=SUM, max_tokens=3, stream=True))
    assert all("usage" not in chunk.model_fields_set and len(chunk.choices) == 1 for chunk in chunks)


def test_the_async_client_streams_several_answers_at_once(server: str, tiny_model: npqwen.Model) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        chunks = await client.chat.completions.create(model="", messages=SUM, seed=seed, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(ask(client, seed) for seed in range(4))))

    assert asyncio.run(main()) == [tiny_model.chat(SUM, seed=seed).text for seed in range(4)]


def test_the_clients_own_stream_helper_accumulates_the_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="", messages=SUM, seed=1) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "17 + 25 = 42"


def test_n_answers_are_drawn_with_the_seeds_that_follow(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    options: Any = {"n": 3, "seed": 5, "extra_body": NO_THINKING, "temperature": 1.5}
    question: Any = [{"role": "user", "content": "What is a river?"}]
    answer = client.chat.completions.create(model="", messages=question, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    expected = [
        tiny_model.chat(question, seed=seed, thinking=False, temperature=1.5) for seed in (5, 6, 7)
    ]
    assert texts == [reply.text for reply in expected]
    assert len(set(texts)) > 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected[0].usage.prompt_tokens
    assert answer.usage.completion_tokens == sum(reply.usage.generated_tokens for reply in expected)
    chunks = list(client.chat.completions.create(model="", messages=question, stream=True, **options))
    for index, text in enumerate(texts):
        message = streamed(chunks, index)
        assert (message["content"], message["roles"]) == (text, ["assistant"])


def test_max_tokens_ends_an_answer_with_the_reason_length(client: openai.OpenAI) -> None:
    for options in ({"max_tokens": 4}, {"max_completion_tokens": 4}, {"max_tokens": 9, "max_completion_tokens": 4}):
        answer = client.chat.completions.create(model="", messages=SUM, **options)  # type: ignore[call-overload]
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 4


def test_stop_strings_end_the_text_but_not_the_reasoning(client: openai.OpenAI) -> None:
    for stop in (" = 4", ["nothing", " = 4"]):
        answer = client.chat.completions.create(model="", messages=SUM, seed=1, stop=stop)
        assert answer.choices[0].message.content == "17 + 25"
        assert " = 42." in answer.choices[0].message.reasoning_content  # type: ignore[attr-defined]
        assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_library(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    options: Any = {"seed": 1, "logprobs": True, "top_logprobs": 3, "extra_body": NO_THINKING}
    answer = client.chat.completions.create(model="", messages=SUM, **options)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    reply = tiny_model.chat(SUM, seed=1, thinking=False, top_logprobs=3)
    assert reply.logprobs is not None
    assert "".join(token.token for token in logprobs.content) == reply.text
    for token, expected in zip(logprobs.content, reply.logprobs, strict=False):
        assert (token.token, token.bytes) == (expected.text, list(expected.bytes))
        assert token.logprob == pytest.approx(expected.logprob)
        assert [one.token for one in token.top_logprobs] == [one.text for one in expected.top]
    chunks = client.chat.completions.create(model="", messages=SUM, stream=True, **options)
    pieces = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for piece in pieces for token in piece or []] == logprobs.content


def test_logit_bias_and_temperature_reach_the_sampler(client: openai.OpenAI, tiny_model: npqwen.Model) -> None:
    id = tiny_model.tokenizer.encode("4")[0]
    answer = client.chat.completions.create(
        model="", messages=SUM, temperature=0, logit_bias={str(id): -100}, extra_body=NO_THINKING
    )
    reply = tiny_model.chat(SUM, temperature=0, logit_bias={id: -100}, thinking=False)
    assert answer.choices[0].message.content == reply.text
    assert "4" not in reply.text


def test_messages_come_in_all_shapes_that_clients_send(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "You add numbers."}], "name": "me"},
        {"role": "user", "content": "What is 1 + 2?", "name": "you"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
        ], "refusal": None, "audio": None, "annotations": [], "function_call": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "3", "reasoning_content": "1 + 2 = 3."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ["What is ", {"type": "text", "text": "17 + 25?"}]},
    ]  # fmt: skip
    answer = client.chat.completions.create(model="", messages=messages, max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 60


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"reasoning_effort": "minimal"},
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning": {"effort": "none"}},
        {"reasoning": {"enabled": False}},
        {"thinking": {"type": "disabled"}},
        {"thinking_budget": 0},
    ],
)
def test_thinking_is_switched_off_in_every_dialect(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    answer = client.chat.completions.create(model="", messages=SUM, seed=1, extra_body=fields)
    assert answer.choices[0].message.content == "17 + 25 = 42"
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("effort", [effort for effort, budget in EFFORTS.items() if budget != 0])
def test_efforts_let_the_model_think(client: openai.OpenAI, effort: Any) -> None:
    answer = client.chat.completions.create(model="", messages=SUM, seed=1, reasoning_effort=effort)
    assert answer.choices[0].message.reasoning_content  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_inline_hidden_or_apart(client: openai.OpenAI, tiny_model: npqwen.Model, stream: bool) -> None:
    reply = tiny_model.chat(SUM, seed=1)

    def content(**fields: Any) -> tuple[str | None, str | None]:
        answer: Any = client.chat.completions.create(
            model="", messages=SUM, seed=1, stream=stream, extra_body=fields
        )
        if stream:
            message = streamed(answer)
            return message["content"], message["reasoning_content"] or None
        message = answer.choices[0].message
        return message.content, getattr(message, "reasoning_content", None)

    assert content(reasoning_format="none") == (f"<think>\n{reply.reasoning}\n</think>\n\n{reply.text}", None)
    assert content(reasoning={"exclude": True}) == (reply.text, None)
    assert content(include_reasoning=False) == (reply.text, None)
    assert content(reasoning_format="deepseek") == (reply.text, reply.reasoning)
    assert content(reasoning_format="auto") == (reply.text, reply.reasoning)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_that_is_cut_off_is_left_open(client: openai.OpenAI, stream: bool) -> None:
    fields = {"reasoning_format": "none"}
    answer: Any = client.chat.completions.create(
        model="", messages=SUM, seed=1, max_tokens=6, stream=stream, extra_body=fields
    )
    content = streamed(answer)["content"] if stream else answer.choices[0].message.content
    assert content == "<think>\n17 + "


class Sum(BaseModel):
    """What the example model is asked for."""

    left: int
    right: int
    sum: int


def test_an_answer_of_a_pydantic_type_is_parsed_by_the_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="", messages=SUM, seed=1, response_format=Sum)
    message = answer.choices[0].message
    assert isinstance(message.parsed, Sum)
    assert message.content is not None
    assert Sum.model_validate_json(message.content) == message.parsed
    assert message.reasoning_content == "17 + 20 = 37. 37 + 5 = 42."  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object"}, "max_tokens": 9}, r"\{.*"),
        ({"guided_regex": "[a-c]{3}"}, "[a-c]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "x" ("y" | "z")'}, "xy|xz"),
        ({"structured_outputs": {"choice": ["north"]}}, "north"),
    ],
)
def test_structures_of_every_dialect_are_obeyed(client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    answer = client.chat.completions.create(model="", messages=SUM, seed=1, extra_body={**NO_THINKING, **fields})
    content = answer.choices[0].message.content
    assert content is not None
    assert re.fullmatch(pattern, content, re.S)
