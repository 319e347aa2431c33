"""ollama's API, for the clients that know nothing else."""

from npqwen.server.ollama.routes import routes

__all__ = ["routes"]
