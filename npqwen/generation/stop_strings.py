"""Ends a text before the first of some stop strings, wherever the token boundaries are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from npqwen.errors import OptionError
from npqwen.wording import quoted

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class StopStrings:
    """Passes text on until it contains one of `strings`, and holds back what could still become one.

    The string that is completed first ends the text; of two completed by the same character, the longer one. The
    result therefore does not depend on how the text is cut into pieces.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self.strings = check_stop("stop", strings)
        self._held = ""
        self.found: str | None = None
        """The string that ended the text, if one did."""

    def push(self, text: str) -> str:
        """Take the next piece; returns the text that is now certain to precede any stop string. May set `found`."""
        text = self._held + text
        complete = [(text.index(s) + len(s), -len(s), s) for s in self.strings if s in text]
        if complete:
            end, minus_length, self.found = min(complete)
            self._held = ""
            return text[: end + minus_length]
        held = 0
        for string in self.strings:
            longest = min(len(string) - 1, len(text))
            held = max(held, next((k for k in range(longest, 0, -1) if text.endswith(string[:k])), 0))
        end = len(text) - held
        self._held = text[end:]
        return text[:end]

    def finish(self, text: str) -> str:
        """Take the last piece; returns all remaining text, up to a stop string."""
        certain = self.push(text)
        held, self._held = self._held, ""
        return certain + held


def check_stop(name: str, stop: Any) -> list[str]:
    """One string or several as a list; OptionError if one is empty or not valid Unicode."""
    if not isinstance(stop, Iterable) or isinstance(stop, bytes):
        raise OptionError(f"{name} is {quoted(stop)}; it must be a string or several")
    strings = [stop] if isinstance(stop, str) else list(stop)
    for string in strings:
        if not isinstance(string, str) or not string or _LONE_SURROGATE.search(string):
            raise OptionError(f"{name} has {quoted(string)}; each must be valid Unicode of at least one character")
    return strings
