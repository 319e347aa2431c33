"""The routes of OpenAI's API, each with and without /v1."""

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
from npqwen.server.openai.models import list_models, retrieve_model
from npqwen.server.openai.responses import count_input_tokens, create_response

if TYPE_CHECKING:
    from npqwen.server.models import Models

    Handler = Callable[[Request], Awaitable[Response]]


def routes(models: Models) -> list[Route]:
    """All routes of the API over these models. The application turns errors that handlers raise into responses."""
    endpoints: list[tuple[str, str, Handler]] = [
        ("/chat/completions", "POST", partial(chat_completions, models)),
        ("/completions", "POST", partial(completions, models)),
        ("/responses", "POST", partial(create_response, models)),
        ("/responses/input_tokens", "POST", partial(count_input_tokens, models)),
        ("/embeddings", "POST", partial(embeddings, models)),
        ("/models", "GET", partial(list_models, models)),
        ("/models/{name:path}", "GET", partial(retrieve_model, models)),
    ]
    return [
        Route(prefix + path, handler, methods=[method])
        for path, method, handler in endpoints
        for prefix in ("/v1", "")
    ]
