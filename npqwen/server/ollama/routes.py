"""The routes of ollama's API, including those that this server does not support."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from npqwen.errors import ModelNotFoundError
from npqwen.server.failure import Failure
from npqwen.server.fields import read_fields
from npqwen.server.json_text import JSONReply, json_text
from npqwen.server.ollama.catalogue import running, show, tags, version
from npqwen.server.ollama.chat import chat
from npqwen.server.ollama.embed import embed, embeddings
from npqwen.server.ollama.generate import generate
from npqwen.server.refusal import refusal

if TYPE_CHECKING:
    from npqwen.server.models import Models

_NOT_HERE = {
    "/api/push": "models are not published from here; use huggingface_hub",
    "/api/create": "models are not made here; convert one with npqwen convert, and serve its directory",
    "/api/copy": "models are not copied here; npqwen serve --alias NAME=MODEL gives one another name",
    "/api/delete": "models are not removed here; npqwen rm MODEL does that",
    "/api/blobs/{digest:path}": "files are not uploaded here; npqwen serve MODEL reads checkpoints",
}
"""ollama's other paths, and what to do instead."""


def routes(models: Models) -> list[Route]:
    """All routes of the API over these models."""
    return [
        Route("/api/chat", partial(chat, models), methods=["POST"]),
        Route("/api/generate", partial(generate, models), methods=["POST"]),
        Route("/api/embed", partial(embed, models), methods=["POST"]),
        Route("/api/embeddings", partial(embeddings, models), methods=["POST"]),
        Route("/api/tags", partial(tags, models)),
        Route("/api/ps", partial(running, models)),
        Route("/api/show", partial(show, models), methods=["POST"]),
        Route("/api/version", version),
        Route("/api/pull", partial(_pull, models), methods=["POST"]),
        *[
            Route(path, partial(_not_here, advice), methods=["DELETE", "GET", "HEAD", "POST"])
            for path, advice in _NOT_HERE.items()
        ],
    ]


async def _pull(models: Models, request: Request) -> Response:
    """Report success for a model that is served: many scripts pull theirs before they use it."""
    fields = await read_fields(request)
    name = fields.text("model") or fields.required("name", fields.text)
    try:
        models.state(name)
    except ModelNotFoundError as error:
        failure = Failure(404, f"{error}; models are not downloaded by request, but by npqwen serve MODEL")
        return refusal(request.scope, failure)
    if fields.flag("stream") is False:
        return JSONReply({"status": "success"})
    return Response(f"{json_text({'status': 'success'})}\n", media_type="application/x-ndjson")


async def _not_here(advice: str, request: Request) -> Response:
    return refusal(request.scope, Failure(501, advice))
