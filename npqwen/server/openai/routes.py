"""The routes of OpenAI's API but /v1/models, each with and without /v1."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from npqwen.server.openai.chat import chat_completions
from npqwen.server.openai.completions import completions
from npqwen.server.openai.embeddings import embeddings
from npqwen.server.openai.responses import count_input_tokens, create_response

if TYPE_CHECKING:
    from npqwen.server.models import Models

    Handler = Callable[[Request], Awaitable[Response]]


def routes(models: Models) -> list[Route]:
    """All routes of the API over these models. The application turns errors that handlers raise into responses."""
    endpoints: dict[str, Handler] = {
        "/chat/completions": partial(chat_completions, models),
        "/completions": partial(completions, models),
        "/responses": partial(create_response, models),
        "/responses/input_tokens": partial(count_input_tokens, models),
        "/embeddings": partial(embeddings, models),
    }
    return [
        Route(prefix + path, handler, methods=["POST"]) for path, handler in endpoints.items() for prefix in ("/v1", "")
    ]
