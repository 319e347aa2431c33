"""300 mutated bodies on ollama's endpoints: each is answered, or refused in ollama's shape."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from asgi import exchange
from test_ollama_chat import TOOL

import npqwen
from npqwen.server import app
from npqwen.server.requests import Request
from npqwen.server.run import Run
from npqwen.server.worker import Worker

OPTIONS = {
    "num_ctx": 512, "num_predict": 3, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.0, "seed": 1,
    "stop": ["x"], "repeat_penalty": 1.1, "repeat_last_n": -1, "num_thread": 1, "mirostat": 0, "use_mmap": True,
}  # fmt: skip
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    (
        "/api/chat",
        {
            "model": "tiny-qwen3-16",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi", "images": []},
                {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [CALL]},
                {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
            ],
            "tools": [TOOL],
            "think": False,
            "stream": False,
            "options": OPTIONS,
            "keep_alive": "5m",
        },
    ),
    (
        "/api/chat",
        {"messages": [{"role": "user", "content": "Hi"}], "think": "low", "logprobs": True, "top_logprobs": 2,
         "options": OPTIONS},
    ),
    (
        "/api/generate",
        {"model": "", "prompt": "Hi", "system": "Be kind.", "suffix": "", "template": "", "context": [], "raw": False,
         "format": "", "think": True, "options": OPTIONS, "keep_alive": 60},
    ),
    ("/api/generate", {"prompt": "Once", "raw": True, "suffix": "end", "stream": True, "options": OPTIONS}),
    ("/api/show", {"model": "tiny-qwen3-16", "verbose": True}),
    ("/api/pull", {"model": "tiny-qwen3-16", "stream": False}),
]  # fmt: skip
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, -2, 3.5, 1e308, 10**30, "", "x", "\ud800", "\x00", "<|im_end|>", "5m", "json",
    "9" * 400, [], {}, [[]], [None], [{}], {"": None}, {"type": "object"}, {"type": 3}, ["a", 1], "y" * 5000,
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value, with each of its keys or indices."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A path, and a body with one to three changes."""
    path, body = copy.deepcopy(rng.choice(SEEDS))
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(body) or [(body, "messages")])
        if rng.random() < 0.8:
            container[key] = copy.deepcopy(rng.choice(NASTY))
        else:
            del container[key]
    data = json.dumps(body).encode()
    if rng.random() < 0.1:
        at = rng.randrange(len(data))
        data = data[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(0, 3))) + data[at + 1 :]
    return path, data


@pytest.mark.filterwarnings("ignore::npqwen.SamplingWarning")
def test_mutated_bodies_are_answered_or_refused(
    tiny_model: npqwen.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Worker.start

    async def short(self: Worker, request: Request) -> Run:
        options: Any = {**request.options, "max_tokens": min(request.options.get("max_tokens") or 3, 3)}
        return await start(self, replace(request, options=options))

    monkeypatch.setattr(Worker, "start", short)
    served = app(tiny_model)
    rng = random.Random(23)

    async def main() -> Counter[int]:
        statuses: Counter[int] = Counter()
        for _ in range(300):
            path, body = mutated(rng)
            reply = await exchange(served, "POST", path, {}, body)
            statuses[reply.status] += 1
            if reply.status == 200:
                lines = [json.loads(line) for line in reply.body.splitlines()]
                last = lines[-1]
                assert last.get("done") or path in ("/api/show", "/api/pull"), (path, body, last)
            else:
                assert reply.status in (400, 404), (path, body, reply)
                assert list(reply.json) == ["error"]
                assert "\n" not in reply.json["error"]
        await served.state.models.close()
        return statuses

    statuses = asyncio.run(main())
    assert min(statuses[200], statuses[400], statuses[404]) > 5, statuses
