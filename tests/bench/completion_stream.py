"""Streams of POST /v1/completions, and when their text came: a client that takes little of the machine's time."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream:
    """A finished stream.

    sent, times: values of `time.perf_counter` when the request was sent, and when each event with text came. tokens:
    generated ones, as the server counts them; an event may have the text of several.
    """

    prompt_tokens: int
    sent: float
    tokens: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring events."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def stream(port: int, prompt: Sequence[int], tokens: int, more: Mapping[str, Any]) -> Stream:
    """Generate `tokens` tokens greedily. more: fields to add. SystemExit if the server counts others, or refuses."""
    body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True}
    content = json.dumps({**body, "stream_options": {"include_usage": True}, **more})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        found = Stream(len(prompt), time.perf_counter())
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{response.status}: {response.read().decode('utf-8', 'replace')[:500]}")
        usage: dict[str, int] = {}
        while line := response.readline():
            now = time.perf_counter()
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if any(choice["text"] for choice in event["choices"]):
                found.times.append(now)
    finally:
        connection.close()
    found.tokens = usage.get("completion_tokens", 0)
    if found.tokens != tokens or usage["prompt_tokens"] != len(prompt):
        raise SystemExit(f"{len(prompt)} + {tokens} tokens were wanted, but the server counts {usage}")
    return found


def streams(
    port: int, prompts: Sequence[Sequence[Sequence[int]]], tokens: int, more: Mapping[str, Any]
) -> list[Stream]:
    """The streams of several clients at once; prompts[i]: those that client i sends, one after another."""

    def client(own: Sequence[Sequence[int]]) -> list[Stream]:
        return [stream(port, prompt, tokens, more) for prompt in own]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return [one for several in pool.map(client, prompts) for one in several]


def decode_rate(found: Sequence[Stream]) -> float:
    """Tokens a second of all streams together while all of them were being written."""
    start, end = max(one.times[0] for one in found), min(one.times[-1] for one in found)
    inside = sum(one.tokens / len(one.times) * sum(start < moment <= end for moment in one.times) for one in found)
    return inside / (end - start)
