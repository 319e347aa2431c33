"""The ASGI application: routes of all APIs, and what every request passes through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from npqwen.errors import NpqwenError, OptionError
from npqwen.server import anthropic, front, model_list, monitoring, ollama, openai, rerank, resuming, text_routes
from npqwen.server.exchange import HEADER, SCOPE_ID, Exchanges
from npqwen.server.failure import Failure, failure_of
from npqwen.server.guard import BodyLimit, Guard, Keys
from npqwen.server.models import Models
from npqwen.server.offer import Offer
from npqwen.server.recording import Recordings
from npqwen.server.refusal import own_path, refusal
from npqwen.server.resuming import Resumable
from npqwen.server.settings import Settings
from npqwen.server.streaming import ClientGoneError
from npqwen.wording import quoted, shortened

if TYPE_CHECKING:
    from npqwen.model import Model

CLIENT_GONE = 499
"""The status that is logged for a request whose client has disconnected; nobody receives it."""


def app(*models: Model | Offer, **settings: Any) -> Starlette:
    """An ASGI application that serves models; run it with uvicorn, or mount it, with or without a prefix.

        application = npqwen.server.app(npqwen.load("Qwen/Qwen3-0.6B"))

    models: loaded ones, which the caller closes, and offers, which are loaded on demand. settings: the fields of
    `npqwen.server.settings.Settings`, such as api_keys, hosts and origins.

    Its lifespan closes the models that it has loaded; a mounted application has no lifespan, so its owner awaits
    `application.state.models.close()`. Raises OptionError for invalid settings, and for anything but models and offers.
    """
    for model in models:
        if not hasattr(model, "path"):
            raise OptionError(f"{quoted(model)} is not a model; give npqwen.load(...) or npqwen.server.Offer.of(...)")
    chosen = Settings.of(settings)
    return application(Models(*models, settings=chosen), chosen)


def application(models: Models, settings: Settings) -> Starlette:
    """An ASGI application that serves `models`."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await models.close()

    recordings = Recordings()
    made = Starlette(
        routes=[*_routes(models), *resuming.routes(recordings)],
        middleware=_middleware(settings, recordings),
        exception_handlers={
            HTTPException: _refuse,
            NpqwenError: _fail,
            ClientGoneError: _client_gone,
            ClientDisconnect: _client_gone,
            Exception: _internal_error,
        },
        lifespan=lifespan,
    )
    made.router.redirect_slashes = False
    made.state.models = models
    made.state.settings = settings
    return made


def _routes(models: Models) -> list[BaseRoute]:
    return [
        *front.routes(),
        *model_list.routes(models),
        *openai.routes(models),
        *anthropic.routes(models),
        *ollama.routes(models),
        *rerank.routes(models),
        *monitoring.routes(models),
        *text_routes.routes(models),
    ]


def _middleware(settings: Settings, recordings: Recordings) -> list[Middleware]:
    """The middleware, outermost first."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.origins,
        allow_methods=("GET", "POST", "DELETE", "HEAD"),
        allow_headers=("*",),
        expose_headers=("retry-after", HEADER, "x-stream-id"),
    )
    return [
        Middleware(Exchanges),
        Middleware(Guard, settings=settings),
        *([cors] if settings.origins else []),
        Middleware(Keys, settings=settings),
        Middleware(Resumable, recordings=recordings),
        Middleware(BodyLimit, limit=settings.body_limit),
    ]


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = shortened(own_path(request.scope))
    problem = {404: f"no such endpoint: {path}", 405: f"{path} does not support {request.method}"}
    failure = Failure(error.status_code, problem.get(error.status_code, error.detail))
    return refusal(request.scope, failure, error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    return refusal(request.scope, failure_of(error))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _internal_error(request: Request, error: Exception) -> Response:
    """The server logs the traceback."""
    failure = Failure(500, "internal error; the server's log has the details", "internal_error")
    return refusal(request.scope, failure, {HEADER: request.scope[SCOPE_ID]})
