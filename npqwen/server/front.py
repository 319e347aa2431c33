"""`/`: the page for browsers, and for ollama's clients the sentence by which they recognize their server."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from npqwen.server import page

RUNNING = "Ollama is running"
_BY_ACCEPT = {"Vary": "Accept"}


def routes() -> list[Route]:
    """`/`, and the page's files below `/page/`."""
    index, *files = page.routes()

    async def front(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse(RUNNING, headers=_BY_ACCEPT)
        response: Response = await index.endpoint(request)
        response.headers.update(_BY_ACCEPT)
        return response

    return [Route("/", front), *files]
