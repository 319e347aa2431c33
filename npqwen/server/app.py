"""The ASGI application: routes of all APIs, and what every request passes through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette

from npqwen.server.models import Models

if TYPE_CHECKING:
    from npqwen.model import Model


def app(*models: Model) -> Starlette:
    """An ASGI application that serves these models; mount it, or run it with uvicorn."""
    application = Starlette(routes=[])
    application.state.models = Models(*models)
    return application
