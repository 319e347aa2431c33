"""POST /api/chat, by the ollama package against a server: answers, streams, tools, thinking, options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest
import scripted
from asgi import post
from reciter import Reciter
from serving import ScriptedModels, served, wait_until

import npqwen
from npqwen.chat.events import Text
from npqwen.errors import ClosedError, QueueFullError
from npqwen.server import streaming
from npqwen.server.app import application
from npqwen.server.fields import Fields
from npqwen.server.ollama.conversation import read_messages
from npqwen.server.settings import Settings

SUM: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[ollama.Client]:
    with ollama.Client(host=server) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server) as http:
        yield http


def options(**given: Any) -> dict[str, Any]:
    return {"seed": 1, **given}


def test_an_answer_is_that_of_the_library(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    answer = client.chat(tiny_model.name, SUM, options=options())
    reply = tiny_model.chat(SUM, seed=1)
    assert answer.message.content == reply.text == "17 + 25 = 42"
    assert answer.message.thinking == reply.reasoning
    assert answer.message.role == "assistant"
    assert answer.message.tool_calls is None
    assert (answer.model, answer.done, answer.done_reason) == (tiny_model.name, True, "stop")
    assert answer.prompt_eval_count == tiny_model.count_tokens(SUM)
    assert answer.eval_count == reply.usage.generated_tokens
    assert answer.total_duration is not None
    assert answer.eval_duration is not None
    assert 0 < answer.eval_duration < answer.total_duration
    assert answer.load_duration is not None
    assert answer.created_at is not None
    assert answer.created_at.endswith("Z")


def test_a_stream_is_the_same_answer_in_pieces(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    reply = tiny_model.chat(SUM, seed=1)
    parts = list(client.chat(tiny_model.name, SUM, stream=True, options=options()))
    assert "".join(part.message.content or "" for part in parts) == reply.text
    assert "".join(part.message.thinking or "" for part in parts) == reply.reasoning
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == reply.usage.generated_tokens
    assert all(part.eval_count is None for part in parts[:-1])
    assert len(parts) > 3  # draft tokens come together


def test_a_stream_is_lines_of_json_and_the_default(server: str) -> None:
    body = {"model": "tiny-qwen3-16", "messages": SUM, "think": False, "options": options()}
    reply = httpx.post(f"{server}/api/chat", json=body)
    assert reply.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert lines[0] == {
        "model": "tiny-qwen3-16",
        "created_at": lines[0]["created_at"],
        "message": {"role": "assistant", "content": ""},
        "done": False,
    }
    assert "".join(line["message"]["content"] for line in lines) == "17 + 25 = 42"


@pytest.mark.parametrize("stream", [True, False])
def test_think_is_obeyed(stream: bool, client: ollama.Client, tiny_model: npqwen.Model) -> None:
    def thinking(think: Any) -> tuple[str, str]:
        parts: Any = client.chat(tiny_model.name, SUM, stream=stream, think=think, options=options())  # type: ignore[call-overload]
        found = list(parts) if stream else [parts]
        text = "".join(part.message.content or "" for part in found)
        return text, "".join(part.message.thinking or "" for part in found)

    assert thinking(True) == ("17 + 25 = 42", tiny_model.chat(SUM, seed=1, thinking=True).reasoning)
    assert thinking(False) == ("17 + 25 = 42", "")
    assert thinking("low")[1]
    assert thinking("none")[1] == ""


def test_tools_are_called_and_their_results_read(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    answer = client.chat(tiny_model.name, WEATHER, tools=[TOOL], think=False, options=options())
    reply = tiny_model.chat(WEATHER, tools=[TOOL], thinking=False, seed=1)
    assert answer.message.tool_calls is not None
    call = answer.message.tool_calls[0].function
    assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
    assert answer.message.content == reply.text
    assert answer.done_reason == "stop"

    parts = list(client.chat(tiny_model.name, WEATHER, tools=[TOOL], think=False, stream=True, options=options()))
    calls = [call for part in parts for call in part.message.tool_calls or []]
    assert [call.function.arguments for call in calls] == [{"city": "Paris"}]

    result = {"role": "tool", "tool_name": "get_weather", "content": '{"temperature": 21, "sky": "sunny"}'}
    messages = [*WEATHER, answer.message, result]
    last = client.chat(tiny_model.name, messages, tools=[TOOL], think=False, options=options())
    past = [*WEATHER, *reply.messages, {"role": "tool", "content": result["content"]}]
    assert last.message.content == tiny_model.chat(past, tools=[TOOL], thinking=False, seed=1).text
    assert "21" in (last.message.content or "")


@pytest.mark.parametrize(("ids", "order"), [(("a", "b"), ["sun", "rain"]), ((None, None), ["rain", "sun"])])
def test_results_are_in_the_order_of_their_calls_if_calls_have_ids(ids: tuple[Any, Any], order: list[str]) -> None:
    calls = [{"id": id, "function": {"name": "look", "arguments": {}}} for id in ids]
    results = [{"role": "tool", "tool_call_id": id, "content": text} for id, text in (("b", "rain"), ("a", "sun"))]
    messages = [*WEATHER, {"role": "assistant", "tool_calls": calls}, *results]
    assert [message["content"] for message in read_messages(Fields({"messages": messages}))[2:]] == order


def test_python_functions_become_tools(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    def get_weather(city: str) -> str:
        """Get the current weather in a city.

        Args:
          city: The city.
        """
        return city

    answer = client.chat(tiny_model.name, WEATHER, tools=[get_weather], think=False, options=options())
    assert answer.message.tool_calls is not None
    assert answer.message.tool_calls[0].function.arguments == {"city": "Paris"}


def test_options_shape_the_answer(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    def text(**given: Any) -> tuple[str | None, str | None]:
        answer = client.chat(tiny_model.name, SUM, think=False, options=given)
        return answer.message.content, answer.done_reason

    assert text(temperature=0, num_predict=3) == ("17 +", "length")
    assert text(temperature=0, num_predict=-1) == ("17 + 25 = 42", "stop")
    assert text(temperature=0, stop=["="]) == ("17 + 25 ", "stop")
    assert text(temperature=0, stop="25") == ("17 + ", "stop")
    assert text(temperature=0, stop=[]) == ("17 + 25 = 42", "stop")
    library = tiny_model.chat(
        SUM, thinking=False, seed=3, temperature=5.0, top_k=50, top_p=0.9, min_p=0.01, presence_penalty=1.0,
        frequency_penalty=0.5, repetition_penalty=1.2, max_tokens=20,
    )  # fmt: skip
    wild = {
        "seed": 3, "temperature": 5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 1,
        "frequency_penalty": 0.5, "repeat_penalty": 1.2, "num_predict": 20, "repeat_last_n": -1, "num_gpu": 99,
        "num_keep": 4, "mirostat": 0, "a_new_option": True,
    }  # fmt: skip
    assert text(**wild)[0] == library.text


def test_a_prompt_is_never_cut_to_num_ctx(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    """A context that is too small for the prompt is refused, with both numbers, and the whole prompt is read else."""
    tokens = tiny_model.count_tokens(SUM, thinking=False)
    for context in (tokens, tokens - 1, 5):
        problem = f"the prompt has {tokens} tokens, but num_ctx is {context}"
        with pytest.raises(ollama.ResponseError, match=problem) as error:
            client.chat(tiny_model.name, SUM, think=False, options={"num_ctx": context})
        assert error.value.status_code == 400
    for stream in (True, False):
        answer: Any = client.chat(
            tiny_model.name, SUM, think=False, stream=stream, options={"num_ctx": tokens + 3, "temperature": 0}
        )
        last = list(answer)[-1] if stream else answer
        assert (last.prompt_eval_count, last.eval_count, last.done_reason) == (tokens, 3, "length")


def test_a_num_ctx_beyond_the_servers_has_no_effect(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    large = options(num_ctx=1_000_000)
    assert client.chat(tiny_model.name, SUM, options=large).message.content == "17 + 25 = 42"
    long: list[Any] = [{"role": "user", "content": "word " * 3000}]
    for given in ({}, large):
        with pytest.raises(ollama.ResponseError, match=r"2,?048") as error:
            client.chat(tiny_model.name, long, options=given)
        assert error.value.status_code == 400


def test_system_messages_may_be_anywhere(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *SUM, {"role": "system", "content": "Be kind."}]
    assert client.chat(tiny_model.name, messages, options=options(num_predict=5)).done


def test_log_probabilities(client: ollama.Client, tiny_model: npqwen.Model) -> None:
    reply = tiny_model.chat(SUM, thinking=False, seed=1, logprobs=True, top_logprobs=2)
    assert reply.logprobs is not None
    whole = client.chat(tiny_model.name, SUM, think=False, logprobs=True, top_logprobs=2, options=options())
    stream = client.chat(
        tiny_model.name, SUM, think=False, logprobs=True, top_logprobs=2, options=options(), stream=True
    )
    streamed = [one for part in stream for one in part.logprobs or []]
    expected = [(one.text, [top.text for top in one.top]) for one in reply.logprobs[:-1]]  # without eos
    for found in (whole.logprobs or [], streamed):
        assert [(one.token, [top.token for top in one.top_logprobs or []]) for one in found] == expected
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in reply.logprobs[:-1]], abs=1e-4)


def test_a_client_that_goes_ends_its_answer(tiny_model: npqwen.Model) -> None:
    models: Any = ScriptedModels(tiny_model)
    with served(application(models, Settings())) as url:
        with httpx.stream("POST", f"{url}/api/chat", json={"messages": SUM}) as stream:
            next(stream.iter_lines())
        wait_until(lambda: models.runs[0].cancelled)
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{url}/api/chat", json={"messages": SUM, "stream": False}, timeout=0.2)
        wait_until(lambda: models.runs[1].cancelled)


def test_an_error_in_the_middle_of_a_stream_reaches_the_client(tiny_model: npqwen.Model) -> None:
    models: Any = ScriptedModels(tiny_model)
    with served(application(models, Settings())) as url, ollama.Client(host=url) as client:
        stream = client.chat("m", SUM, stream=True)
        assert next(stream).message.content == ""
        models.put(Text("Well"))
        assert next(stream).message.content == "Well"
        models.put(ClosedError("the server is shutting down"))
        with pytest.raises(ollama.ResponseError, match="shutting down"):
            next(stream)


def test_a_stream_is_never_silent(tiny_model: npqwen.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEPALIVE", 0.02)
    models: Any = ScriptedModels(tiny_model)
    with served(application(models, Settings())) as url, ollama.Client(host=url) as client:
        stream = client.chat("m", SUM, stream=True)
        parts = [next(stream) for _ in range(4)]
        models.put(Text("Well"))
        while not parts[-1].message.content:
            parts.append(next(stream))
        assert {part.message.content for part in parts} == {"", "Well"}
        stream.close()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot'"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "reads text only"),
        ({"messages": "x"}, "messages is 'x'"),
        ({"messages": SUM, "format": "xml"}, "format is 'xml'"),
        ({"messages": SUM, "think": "hard"}, "think is 'hard'"),
        ({"messages": SUM, "keep_alive": "soon"}, "keep_alive: 'soon' is not a time"),
        ({"messages": SUM, "options": {"temperature": -1}}, "options.temperature is -1"),
        ({"messages": SUM, "options": {"mirostat": 2}}, "options.mirostat"),
        ({"messages": SUM, "options": {"num_predict": 0}}, "options.num_predict is 0"),
        ({"messages": SUM, "options": {"num_thread": 64}}, "was started with 1 threads"),
        ({"messages": SUM, "options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "options.repeat_last_n"),
        ({"messages": SUM, "tools": [{"type": "function"}]}, "tools[0].function is missing"),
        ({"messages": SUM, "top_logprobs": 3}, "needs logprobs"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "name is missing"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(body: dict[str, Any], problem: str, http: httpx.Client) -> None:
    reply = http.post("/api/chat", json=body)
    assert reply.status_code == 400
    assert list(reply.json()) == ["error"]
    assert problem in reply.json()["error"]


def test_an_answer_that_the_messages_end_with_is_continued() -> None:
    body = {"messages": [*SUM, {"role": "assistant", "content": "17 + 25"}], "stream": False}
    model = Reciter(" is 42.", " is 42.")
    assert scripted.post(model, "/api/chat", body)["message"] == {"role": "assistant", "content": " is 42."}
    lines = scripted.ask(model, "/api/chat", {**body, "stream": True}).text.splitlines()
    assert "".join(json.loads(line)["message"]["content"] for line in lines) == " is 42."
    assert all(prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n17 + 25") for prompt in model.prompts)


def test_too_many_requests_are_told_when_to_try_again(tiny_model: npqwen.Model) -> None:
    models: Any = ScriptedModels(tiny_model)
    models.error = QueueFullError("64 requests are waiting already; try again later", retry_after=7)
    reply = post(application(models, Settings()), "/api/chat", {"messages": SUM})
    assert (reply.status, reply.headers["retry-after"]) == (503, "7")
    assert reply.json == {"error": "64 requests are waiting already; try again later"}


def test_an_unknown_model_is_not_found(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="there is only tiny-qwen3-16") as error:
        client.chat("llama3", SUM)
    assert error.value.status_code == 404
    assert client.chat("tiny-qwen3-16:latest", SUM, options={"num_predict": 1}).done
