"""From MODEL, as users name it, to a converted directory: used in place, or downloaded and converted once."""

from npqwen.hub.conversions import convert, find_converted, resolve

__all__ = ["convert", "find_converted", "resolve"]
