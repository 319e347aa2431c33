"""The HTTP server: OpenAI's, Anthropic's and ollama's APIs over one model or several; extra `npqwen[server]`."""

from npqwen.server.app import app
from npqwen.server.offer import Offer

__all__ = ["Offer", "app"]
