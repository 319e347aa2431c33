"""Calls an ASGI application without a socket: requests that no client library would send, byte by byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message


@dataclass
class Reply:
    """A response. read: how many of the body's pieces the application has taken."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    read: int = 0

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def exchange(
    application: ASGIApp,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes | Sequence[bytes] = b"",
    root_path: str = "",
) -> Reply:
    """One request, with "Host: localhost" unless `headers` has another. body: in pieces, as of a chunked one.

    A header that is "" is left out.
    """
    reply = Reply()
    pieces = [body] if isinstance(body, bytes) else list(body)
    given = {"host": "localhost", **{name.lower(): value for name, value in (headers or {}).items()}}
    place, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(place),
        "raw_path": place.encode(),
        "root_path": root_path,
        "query_string": query.encode(),
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items() if value],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    complete = asyncio.Event()

    async def receive() -> Message:
        if reply.read < len(pieces):
            reply.read += 1
            return {"type": "http.request", "body": pieces[reply.read - 1], "more_body": reply.read < len(pieces)}
        await complete.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.body += message.get("body", b"")
            if not message.get("more_body"):
                complete.set()

    await application(scope, receive, send)
    return reply


def call(application: ASGIApp, method: str, path: str, *args: Any, **options: Any) -> Reply:
    """`exchange` in an event loop of its own."""
    return asyncio.run(exchange(application, method, path, *args, **options))


def post(application: ASGIApp, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Reply:
    """The reply to a JSON body."""
    return call(application, "POST", path, headers, json.dumps(body).encode())
