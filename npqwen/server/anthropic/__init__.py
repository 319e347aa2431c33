"""Anthropic's Messages API."""

from npqwen.server.anthropic.routes import routes

__all__ = ["routes"]
