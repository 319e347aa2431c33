"""The HTTP server: OpenAI's, Anthropic's and ollama's APIs over one model or several; extra `npqwen[server]`."""

from importlib.util import find_spec

from npqwen.errors import OptionError

if find_spec("starlette") is None:
    raise OptionError('starlette is not installed; pip install "npqwen[server]"')

from npqwen.server.app import app
from npqwen.server.offer import Offer

__all__ = ["Offer", "app"]
