"""The ASGI application: routes of all APIs, and what every request passes through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette

from npqwen.server import anthropic
from npqwen.server.models import Models
from npqwen.server.openai import responses

if TYPE_CHECKING:
    from npqwen.model import Model


def app(*models: Model) -> Starlette:
    """An ASGI application that serves these models; mount it, or run it with uvicorn."""
    workers = Models(*models)
    application = Starlette(routes=[*anthropic.routes(workers), *responses.routes(workers)])
    application.state.models = workers
    return application
