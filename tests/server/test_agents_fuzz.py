"""Mutated requests of agents: each is answered rightly, or refused in the API's own shape."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from event_streams import MessageReader, ResponseReader, server_sent
from reciter import Reciter
from scripted import recorded

from npqwen.server import app

COUNT = 300
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 3.5, 1e300, 10**30, 2**63, "", "x", "\x00", "\ud800", "<|im_end|>", "é" * 50,
    [], {}, [[]], [{}], [None], {"type": "text"}, {"type": "image"}, {"": {}}, [{"type": "text", "text": "x"}],
]  # fmt: skip


class Patient(Reciter):
    """A model that says the same again and again, or calls a tool."""

    def __init__(self) -> None:
        super().__init__(context=16384)
        self._texts = Endless(self.tokenizer.encode("<think>\nHm.\n</think>\n\nYes."))


class Endless(list[list[int]]):
    """A list whose first item is always there."""

    def __init__(self, item: list[int]) -> None:
        super().__init__([item])

    def pop(self, index: Any = -1) -> list[int]:
        return self[0]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def mutated(request: dict[str, Any], draw: random.Random) -> bytes:
    """The body of a request with one to three places changed, or bytes that are no JSON."""
    request = copy.deepcopy(request)
    donors = places(request)
    for _ in range(draw.randint(1, 3)):
        *path, last = draw.choice([place for place in places(request) if place])
        owner = request
        for key in path:
            owner = owner[key]
        kind = draw.randrange(5)
        if kind == 0:
            del owner[last]
        elif kind == 1:
            value: Any = request
            for key in draw.choice(donors):
                value = value[key] if isinstance(value, dict | list) and has(value, key) else value
            owner[last] = copy.deepcopy(value)
        else:
            owner[last] = draw.choice(STRANGE)
    text = json.dumps(request)
    if draw.random() < 0.1:
        at = draw.randrange(len(text))
        return (text[:at] + draw.choice(['"', "{", "\\", "", "\u00e9", ","]) + text[at + 1 :]).encode()
    return text.encode()


def has(value: Any, key: Any) -> bool:
    return key in value if isinstance(value, dict) else isinstance(key, int) and key < len(value)


def check_message(response: httpx.Response) -> None:
    body = response.json()
    if response.status_code != 200:
        assert body.keys() == {"type", "error", "request_id"}
        assert body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
    else:
        assert body["type"] == "message"
        assert body["stop_reason"]


def check_response(response: httpx.Response) -> None:
    body = response.json()
    if response.status_code != 200:
        assert body["error"].keys() == {"message", "type", "param", "code"}
    else:
        assert body["object"] == "response"
        assert body["status"] in ("completed", "incomplete")


@pytest.mark.parametrize(
    ("path", "name", "check", "reader"),
    [
        ("/v1/messages", "claude_code", check_message, MessageReader),
        ("/v1/responses", "codex", check_response, ResponseReader),
    ],
    ids=["claude-code", "codex"],
)
def test_no_body_is_an_internal_error(
    path: str, name: str, check: Callable[[httpx.Response], None], reader: Any, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(16)
    model: Any = Patient()
    request = recorded(name) | {"stream": False}
    request["tools"] = request["tools"][:6]  # so that other fields have their turn
    statuses: dict[int, int] = {}

    async def fuzz() -> None:
        application = app(model)
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as http:
            for _ in range(COUNT):
                content = mutated(request, draw)
                response = await http.post(path, content=content)
                assert response.status_code < 500, (content, response.text)
                assert response.status_code in (200, 400, 404), (content, response.text)
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                if response.headers["content-type"].startswith("text/event-stream"):
                    stream = reader(server_sent(response.text.split("\n")))
                    assert stream.over
                else:
                    check(response)
        await application.state.models.close()

    asyncio.run(fuzz())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert statuses[200] > COUNT / 10
    assert statuses[400] > COUNT / 10
