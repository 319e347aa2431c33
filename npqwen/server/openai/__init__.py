"""OpenAI's API: chat completions, completions, responses, and the list of models."""

from npqwen.server.openai.routes import routes

__all__ = ["routes"]
