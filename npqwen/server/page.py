"""The page at `/`: a few static files that talk to the OpenAI API of this server, and load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

_DIRECTORY = Path(__file__).with_name("page")
_INDEX = "index.html"
_FILES = (
    "answer.js",
    "app.js",
    "context_meter.js",
    "conversations.js",
    "dom.js",
    "highlight.js",
    "icon.svg",
    "inline.js",
    "markdown.js",
    "markdown_view.js",
    "menu.js",
    "message_view.js",
    "retries.js",
    "settings.js",
    "sidebar.js",
    "storage.js",
    "stream.js",
    "style.css",
    "theme.js",
)
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _File:
    """Answers GET and HEAD with one file, which is read once."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._etag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'
        self._type = _TYPES[path.suffix]

    async def __call__(self, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": self._etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._etag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        headers |= {"Content-Length": str(len(self._content)), "Content-Type": self._type}
        return Response(b"" if request.method == "HEAD" else self._content, headers=headers)


def routes() -> list[Route]:
    """The page at `/` and its parts below `/page/`. All of it is public: the page asks for the API key itself.

    The page finds the API and its own parts by relative URLs, so that an app with these routes can be mounted anywhere.
    """
    paths = {"/": _INDEX, **{f"/page/{name}": name for name in _FILES}}
    return [Route(path, _File(_DIRECTORY / name).__call__) for path, name in paths.items()]
