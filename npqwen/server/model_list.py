"""GET /v1/models and /v1/models/{name}, which OpenAI's and Anthropic's clients request by the same paths."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from npqwen.server.anthropic import models as anthropic
from npqwen.server.anthropic.errors import answering_errors
from npqwen.server.json_text import JSONReply
from npqwen.server.openai import models as openai

if TYPE_CHECKING:
    from npqwen.server.models import Models

ANTHROPIC = "anthropic-version"
"""The header that all of Anthropic's clients send, and no others."""


def routes(models: Models) -> list[Route]:
    """The routes over these models, each with and without /v1."""
    handlers = {"/models": partial(list_models, models), "/models/{name:path}": partial(retrieve_model, models)}
    return [Route(prefix + path, handler) for path, handler in handlers.items() for prefix in ("/v1", "")]


async def list_models(models: Models, request: Request) -> Response:
    """All models on offer, loaded or not, on one page."""
    form = anthropic if ANTHROPIC in request.headers else openai
    return JSONReply(form.listed(models.offered))


async def retrieve_model(models: Models, request: Request) -> Response:
    """One model, by the name that the client calls it.

    ModelNotFoundError, which Anthropic's clients get in their API's format, if it is not on offer.
    """
    form = anthropic if ANTHROPIC in request.headers else openai

    async def reply(request: Request, id: str) -> Response:
        name = request.path_params["name"]
        state = models.state(name)
        return JSONReply(form.described(replace(state, name=name or state.name)))

    return await (answering_errors(reply)(request) if form is anthropic else reply(request, ""))
