"""What tests of agents' APIs share: scripted models behind a server, and requests that agents were seen to send."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray
from reciter import Reciter
from serving import served

from npqwen.engine.kv_cache import KVCache
from npqwen.server import app

REQUESTS = Path(__file__).parent / "data" / "requests"


def recorded(name: str) -> dict[str, Any]:
    """A request with the shape of an agent's: "claude_code" or "codex"; its model is "m"."""
    request: dict[str, Any] = json.loads((REQUESTS / f"{name}.json").read_text(encoding="utf-8"))
    return request | {"model": "m"}


class Held(Reciter):
    """A scripted model that waits until `go` is set: before it reads a prompt, or once it has written `at` tokens."""

    def __init__(self, *texts: str | list[int], at: int | None = None, **options: Any) -> None:
        super().__init__(*texts, **options)
        self.go = threading.Event()
        self._at = at

    def forward(
        self, ids: ArrayLike, cache: KVCache, *, all_logits: bool = False, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        if self._at is None or (self._script and cache.length >= self._start + self._at):
            assert self.go.wait(30), "nobody let the model go on"
        return super().forward(ids, cache, all_logits=all_logits, out=out)


@contextmanager
def client(model: Any) -> Iterator[httpx.Client]:
    """An HTTP client of a server with this model."""
    with served(app(model)) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield http


def ask(model: Any, path: str, body: Any) -> httpx.Response:
    """The response to one request, without a socket in between; a stream is read to its end."""

    async def response() -> httpx.Response:
        application = app(model)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://127.0.0.1") as http:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await asyncio.wait_for(http.post(path, content=content), 60)
        await application.state.models.close()
        return answer

    return asyncio.run(response())


def post(model: Any, path: str, body: Any, status: int = 200) -> Any:
    """The JSON answer to one request, which must have this status."""
    response = ask(model, path, body)
    assert response.status_code == status, response.text
    return response.json()
