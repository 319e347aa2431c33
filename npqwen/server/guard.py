"""ASGI middleware that refuses requests before a handler sees them: by path, host, origin, key and size."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npqwen.server.exchange import current
from npqwen.server.failure import Failure
from npqwen.server.refusal import own_path, refusal
from npqwen.server.settings import Settings, is_address
from npqwen.wording import quoted, shortened, size

BODY_SECONDS = 60.0
"""Seconds that a request's body may take, plus one for each `BODY_RATE` bytes of it."""
BODY_RATE = 10_000
PUBLIC = ("/", "/health")
"""Paths that need no key: they reveal nothing worth protecting."""
OWNER = "npqwen.owner"
"""The scope's entry with the digest of the request's API key; absent if the server requires none."""
PUBLIC_BELOW = "/page/"
"""The page's files: a browser sends no key when it opens a page. The page itself asks for one."""


class Guard:
    """Refuses requests that no legitimate client sends: with ".." in the path, a foreign Host or a foreign Origin.

    A page of another site that resolves its own domain to 127.0.0.1 (DNS rebinding) has the same origin as this server
    to a browser; but its requests carry that domain in the Host header. Numeric addresses cannot be rebound.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._hosts = {host.lower().rstrip(".") for host in settings.hosts}
        self._origins = frozenset(settings.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure = self._failure(scope) if scope["type"] == "http" else None
        if failure is None:
            await self._app(scope, receive, send)
        else:
            await refusal(scope, failure)(scope, receive, send)

    def _failure(self, scope: Scope) -> Failure | None:
        headers = Headers(scope=scope)
        if climbs(scope["path"]):
            return Failure(400, 'a path must not have ".." in it', "invalid_path")
        host = headers.get("host", "")
        if not self._is_own(host):
            name = _without_port(host)
            hint = f"start the server with --allow-host {shortened(name)}" if name else "send a Host header"
            return Failure(403, f"the host {quoted(host)} is not this server's; {hint}", "forbidden_host")
        origin = headers.get("origin")
        if origin is not None and not self._allows(origin, host):
            return Failure(403, _foreign(origin), "forbidden_origin")
        return None

    def _is_own(self, host: str) -> bool:
        name = _without_port(host)
        if not name:
            return False
        local = name == "localhost" or name.endswith(".localhost") or is_address(name)
        return local or "*" in self._hosts or name in self._hosts

    def _allows(self, origin: str, host: str) -> bool:
        """Whether pages of this origin may call the server: its own page, and the settings' origins."""
        origin = origin.lower()
        if "*" in self._origins or origin in self._origins:
            return True
        return origin.partition("://")[2] == host.lower()


class Keys:
    """Refuses requests without one of the settings' keys, if there are any."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._digests = [_digest(key) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or _is_public(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = [key for key in (_bearer(headers.get("authorization", "")), headers.get("x-api-key", "")) if key]
        # Every pair is compared, each in constant time: the timing reveals nothing about the keys.
        matches = [key for one in given for key in self._digests if hmac.compare_digest(_digest(one), key)]
        if matches:
            scope[OWNER] = matches[0]
            exchange = current.get()
            if exchange is not None and len(self._digests) > 1:
                exchange.owner = matches[0].hex()
            await self._app(scope, receive, send)
            return
        problem = "the API key is wrong" if given else "an API key is needed"
        failure = Failure(401, f"{problem}; send Authorization: Bearer KEY or x-api-key: KEY", "invalid_api_key")
        await refusal(scope, failure, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, as soon as that is known, and bodies that arrive too slowly."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = Failure(413, f"the body is larger than {size(self._limit)}, the server's limit", "body_too_large")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > self._limit:
            await refusal(scope, too_large)(scope, receive, send)
            return
        started = time.monotonic()
        read = 0
        complete = begun = False

        async def limited() -> Message:
            nonlocal read, complete
            if complete or begun:
                return await receive()
            try:
                left = started + BODY_SECONDS + read / BODY_RATE - time.monotonic()
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except asyncio.TimeoutError:
                raise _BodyError(_too_slow(read)) from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body")
            if read > self._limit:
                raise _BodyError(too_large)
            return message

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, limited, noted)
        except _BodyError as error:
            if begun:
                raise
            # The rest of the body is not read.
            await refusal(scope, error.failure, {"Connection": "close"})(scope, receive, send)


class _BodyError(BaseException):
    """A BaseException, because handlers answer every Exception with an error of their own."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


def _too_slow(read: int) -> Failure:
    expected = f"{BODY_SECONDS:.0f} seconds, and one more for each {size(BODY_RATE)}"
    return Failure(408, f"only {size(read)} of the body came in time; it may take {expected}", "body_too_slow")


def climbs(path: str) -> bool:
    """Whether a decoded path has a segment "..", also one that is still percent-encoded once or twice."""
    for _ in range(2):
        if ".." in path.replace("\\", "/").split("/"):
            return True
        path = unquote(path)
    return ".." in path.replace("\\", "/").split("/")


def _is_public(scope: Scope) -> bool:
    path = own_path(scope)
    return path in PUBLIC or path.startswith(PUBLIC_BELOW)


def _foreign(origin: str) -> str:
    """Why pages of an origin may not call the server, and how they could."""
    if origin.lower() == "null":  # of every file and sandboxed frame, which one setting would all let in
        return "pages without an origin, such as files, may not call this server; open the page from a web server"
    text = shortened(origin, 200)
    return f"pages of {text} may not call this server; start it with --cors {text}"


def _without_port(host: str) -> str:
    """The lower-case name of a Host header: "localhost" of "localhost:8000", "[::1]" of "[::1]:8000"."""
    name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def _bearer(header: str) -> str:
    kind, _, key = header.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
