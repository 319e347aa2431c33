"""ollama's API, for clients that know no other."""

from npqwen.server.ollama.routes import routes

__all__ = ["routes"]
