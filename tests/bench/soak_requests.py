"""Requests of all APIs for the example model, and their answers in one shape, whichever way they came."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

Json = dict[str, Any]

_WORDS = ["water", "house", "green", "mother", "river", "winter", "paper", "music", "stone", "garden", "letter"]
_CITIES = ["Paris", "London", "Berlin", "Madrid", "Rome", "Tokyo"]
_WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city."}},
        "required": ["city"],
    },
}
_SUM = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}
_PREFIXES = [
    "",
    "You are a helpful assistant.",
    "Explain words briefly. " * 40,
    "One day it rained in the town. " * 110,
]
"""Beginnings that many requests share; the longest has about 900 tokens."""


class BrokenAnswer(Exception):
    """A response with status 200 whose body is not an answer."""


@dataclass
class Answer:
    """One choice. calls: names and arguments. end: why it ended, in the API's words. tokens: of all choices."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    end: str | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Api:
    """How an API is called and answers.

    whole(response) and streamed(events): the choices' answers. Events are the objects of a stream.
    """

    path: str
    whole: Callable[[Json], list[Answer]]
    streamed: Callable[[list[Json]], list[Answer]]


@dataclass(frozen=True)
class SoakRequest:
    """A request whose answer is the same every time."""

    api: Api
    body: Json

    def content(self, stream: bool) -> bytes:
        """The body to send."""
        more: Json = {"stream": stream}
        if stream and self.api in (CHAT, COMPLETIONS):
            more["stream_options"] = {"include_usage": True}
        return json.dumps({**self.body, **more}).encode()


def events_of(text: str) -> list[Json]:
    """The objects of a stream: data of server-sent events, or lines of JSON."""
    lines = (line.removeprefix("data:").strip() for line in text.split("\n") if not line.startswith(("event:", ":")))
    events: list[Json] = [json.loads(line) for line in lines if line and line != "[DONE]"]
    for event in events:
        if "error" in event and event["error"] is not None:
            raise BrokenAnswer(f"error in a stream: {event['error']}")
    return events


def _call(function: Json) -> tuple[str, Any]:
    """A call's name and arguments; as text if the call was cut off."""
    name, arguments = function["name"], function["arguments"]
    try:
        return name, json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return name, arguments


def _chat_whole(body: Json) -> list[Answer]:
    tokens = body["usage"]["completion_tokens"]
    answers = []
    for choice in sorted(body["choices"], key=lambda one: int(one["index"])):
        message = choice["message"]
        calls = [_call(call["function"]) for call in message.get("tool_calls") or []]
        reasoning = message.get("reasoning_content") or ""
        answers.append(Answer(message["content"] or "", reasoning, calls, choice["finish_reason"], tokens))
    return answers


def _chat_streamed(events: list[Json]) -> list[Answer]:
    answers: dict[int, Answer] = {}
    calls: dict[tuple[int, int], Json] = {}
    tokens = None
    for event in events:
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            answer, delta = answers.setdefault(choice["index"], Answer()), choice["delta"]
            answer.text += delta.get("content") or ""
            answer.reasoning += delta.get("reasoning_content") or ""
            answer.end = choice["finish_reason"] or answer.end
            for part in delta.get("tool_calls") or []:
                call = calls.setdefault((choice["index"], part["index"]), {"name": "", "arguments": ""})
                call["name"] += part["function"].get("name") or ""
                call["arguments"] += part["function"].get("arguments") or ""
    for (index, _), call in sorted(calls.items()):
        answers[index].calls.append(_call(call))
    for answer in answers.values():
        answer.tokens = tokens
    return [answers[index] for index in sorted(answers)]


def _completions_whole(body: Json) -> list[Answer]:
    tokens = body["usage"]["completion_tokens"]
    choices = sorted(body["choices"], key=lambda one: int(one["index"]))
    return [Answer(choice["text"], end=choice["finish_reason"], tokens=tokens) for choice in choices]


def _completions_streamed(events: list[Json]) -> list[Answer]:
    answers: dict[int, Answer] = {}
    tokens = None
    for event in events:
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            answer = answers.setdefault(choice["index"], Answer())
            answer.text += choice["text"]
            answer.end = choice["finish_reason"] or answer.end
    for answer in answers.values():
        answer.tokens = tokens
    return [answers[index] for index in sorted(answers)]


def _response_end(body: Json) -> Answer:
    reason = (body.get("incomplete_details") or {}).get("reason")
    return Answer(end=f"{body['status']} {reason}", tokens=body["usage"]["output_tokens"])


def _responses_whole(body: Json) -> list[Answer]:
    answer = _response_end(body)
    for item in body["output"]:
        parts = "".join(part["text"] for part in item.get("content") or [])
        if item["type"] == "message":
            answer.text += parts
        elif item["type"] == "reasoning":
            answer.reasoning += parts
        else:
            answer.calls.append(_call(item))
    return [answer]


def _responses_streamed(events: list[Json]) -> list[Answer]:
    last = events[-1]
    if last["type"] not in ("response.completed", "response.incomplete"):
        raise BrokenAnswer(f"a stream's last event is {last['type']}")
    answer = _response_end(last["response"])
    for event in events:
        if event["type"] == "response.output_text.delta":
            answer.text += event["delta"]
        elif event["type"] == "response.reasoning_text.delta":
            answer.reasoning += event["delta"]
        elif event["type"] == "response.output_item.done" and event["item"]["type"] == "function_call":
            answer.calls.append(_call(event["item"]))
    return [answer]


def _message_end(body: Json, usage: Json) -> Answer:
    return Answer(end=f"{body['stop_reason']} {body['stop_sequence']}", tokens=usage["output_tokens"])


def _messages_whole(body: Json) -> list[Answer]:
    answer = _message_end(body, body["usage"])
    for block in body["content"]:
        answer.text += block.get("text", "")
        answer.reasoning += block.get("thinking", "")
        if block["type"] == "tool_use":
            answer.calls.append((block["name"], block["input"]))
    return [answer]


def _messages_streamed(events: list[Json]) -> list[Answer]:
    ends = [event for event in events if event["type"] == "message_delta"]
    if len(ends) != 1 or events[-1]["type"] != "message_stop":
        raise BrokenAnswer(f"a stream's last event is {events[-1]['type']}")
    answer = _message_end(ends[0]["delta"], ends[0]["usage"])
    calls: dict[int, list[str]] = {}
    for event in events:
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls[event["index"]] = [event["content_block"]["name"], ""]
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            answer.text += delta.get("text", "")
            answer.reasoning += delta.get("thinking", "")
            if "partial_json" in delta:
                calls[event["index"]][1] += delta["partial_json"]
    # A call that was cut off is in the stream, but not in the whole message.
    found = [_call({"name": name, "arguments": arguments or "{}"}) for name, arguments in calls.values()]
    answer.calls = [(name, arguments) for name, arguments in found if not isinstance(arguments, str)]
    return [answer]


def _ollama_whole(body: Json) -> list[Answer]:
    return _ollama_streamed([body])


def _ollama_streamed(events: list[Json]) -> list[Answer]:
    if not events[-1]["done"]:
        raise BrokenAnswer("a stream's last line is not done")
    answer = Answer(end=events[-1]["done_reason"], tokens=events[-1]["eval_count"])
    for event in events:
        message = event["message"]
        answer.text += message["content"]
        answer.reasoning += message.get("thinking") or ""
        answer.calls += [_call(call["function"]) for call in message.get("tool_calls") or []]
    return [answer]


CHAT = Api("/v1/chat/completions", _chat_whole, _chat_streamed)
COMPLETIONS = Api("/v1/completions", _completions_whole, _completions_streamed)
RESPONSES = Api("/v1/responses", _responses_whole, _responses_streamed)
MESSAGES = Api("/v1/messages", _messages_whole, _messages_streamed)
OLLAMA = Api("/api/chat", _ollama_whole, _ollama_streamed)


def soak_requests(count: int, seed: int) -> list[SoakRequest]:
    """As many different requests, of all APIs in turn: the same ones for the same seed."""
    makers = _makers(Random(seed))
    return [next(makers) for _ in range(count)]


def long_requests(seed: int) -> list[SoakRequest]:
    """Requests whose prompts differ from the first word on, so that they take a while to read."""
    random = Random(seed)
    texts = [" ".join(random.choices(_WORDS, k=700)) for _ in range(8)]
    return [SoakRequest(COMPLETIONS, {"prompt": text, "max_tokens": 64, "temperature": 0}) for text in texts]


def _makers(random: Random) -> Iterator[SoakRequest]:
    while True:
        yield SoakRequest(CHAT, _sampled(random) | _choices(random) | _conversation(random, openai=True))
        yield SoakRequest(MESSAGES, _anthropic(random))
        yield SoakRequest(OLLAMA, _ollama(random))
        yield SoakRequest(COMPLETIONS, _sampled(random) | _choices(random) | {"prompt": _raw(random)})
        yield SoakRequest(RESPONSES, _responses(random))


def _raw(random: Random) -> Any:
    """The prompt of a completion: text or token ids."""
    text = f"{random.choice(_PREFIXES)}{random.choice(_WORDS)} is"
    return random.choice([text, [random.randrange(300, 4000) for _ in range(random.randint(1, 300))]])


def _question(random: Random) -> str:
    a, b = random.randint(1, 49), random.randint(1, 49)
    word, city = random.choice(_WORDS), random.choice(_CITIES)
    return random.choice([f"What does {word} mean?", f"What is {a} + {b}?", f"What is the weather in {city}?"])


def _messages(random: Random) -> list[Json]:
    """One question, or the third turn of a conversation."""
    if random.random() < 0.5:
        return [{"role": "user", "content": _question(random)}]
    turns = [_question(random), "I do not know.", _question(random)]
    return [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(turns)]


def _sampled(random: Random) -> Json:
    """Sampling, limits and stop strings by OpenAI's names."""
    options: Json = {"max_tokens": random.randint(8, 96), "seed": random.randrange(2**31)}
    options["temperature"] = random.choice([0, 0.6, 1, 1.5])
    if options["temperature"]:
        options |= random.choice([{}, {"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.05, "top_k": 0}])
    options |= random.choice([{}, {}, {"presence_penalty": 1.0}, {"frequency_penalty": 0.5}, {"repeat_penalty": 1.1}])
    return options | random.choice([{}, {"stop": "."}, {"stop": [" of", "the "]}, {"logit_bias": {"13": -100}}])


def _choices(random: Random) -> Json:
    return random.choice([{}, {}, {"n": 2}])


def _conversation(random: Random, *, openai: bool) -> Json:
    """Messages, thinking and tools of a chat; with openai also a choice of tools and a schema."""
    prefix = random.choice(_PREFIXES)
    system = [{"role": "system", "content": prefix}] if prefix else []
    body: Json = {"messages": [*system, *_messages(random)]}
    if random.random() < 0.3:
        body["tools"] = [{"type": "function", "function": _WEATHER}]
        body |= random.choice([{}, {"tool_choice": "required"}]) if openai else {}
    elif openai and random.random() < 0.2:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SUM}}
    return body | {"enable_thinking": random.random() < 0.5}


def _anthropic(random: Random) -> Json:
    body: Json = {"messages": _messages(random), "max_tokens": random.randint(8, 96), "temperature": 0}
    if prefix := random.choice(_PREFIXES):
        body["system"] = prefix
    if random.random() < 0.3:
        body["tools"] = [{**{key: _WEATHER[key] for key in ("name", "description")}, "input_schema": _SCHEMA}]
    if random.random() < 0.4:
        body["thinking"] = {"type": "enabled", "budget_tokens": random.randint(0, 40)}
    return body | random.choice([{}, {"stop_sequences": ["."]}])


_SCHEMA = _WEATHER["parameters"]


def _ollama(random: Random) -> Json:
    sampled = _sampled(random)
    sampled["num_predict"] = sampled.pop("max_tokens")
    sampled.pop("logit_bias", None)
    body = _conversation(random, openai=False)
    body["think"] = body.pop("enable_thinking")
    return {**body, "options": sampled}


def _responses(random: Random) -> Json:
    body: Json = {"input": _messages(random), "max_output_tokens": random.randint(8, 96), "temperature": 0}
    if prefix := random.choice(_PREFIXES):
        body["instructions"] = prefix
    if random.random() < 0.3:
        body["tools"] = [{"type": "function", **_WEATHER}]
    return body
