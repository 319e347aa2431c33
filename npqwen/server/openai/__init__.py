"""OpenAI's API: chat completions, completions, responses, embeddings, and the form of the list of models."""

from npqwen.server.openai.routes import routes

__all__ = ["routes"]
