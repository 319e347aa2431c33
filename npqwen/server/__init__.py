"""The HTTP server: OpenAI's, Anthropic's and ollama's APIs over one model or several; extra `npqwen[server]`."""

from npqwen.server.app import app

__all__ = ["app"]
