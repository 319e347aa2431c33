"""How much time and memory the rendering of a chat template may take.

What a template has released is unknown, so everything that it creates counts, as if it were kept.
"""

from __future__ import annotations

import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_SECONDS = 0.5
"""CPU time of a rendering in seconds, to which messages add (see `Limits`). A prompt takes at most two renderings and
four probes. Qwen3's template takes 40 µs a message on a PC, and ten times as much on a Raspberry Pi 3."""
PROBE_SECONDS = 0.2
"""CPU time of the rendering of a probe, in seconds; messages add to it as well."""
MAX_SIZE = 500_000
"""Most characters of a text or list, to which the conversation adds four times its own."""
MAX_ITEMS = 100_000
"""Most characters or items of the input of slow filters."""
MAX_WIDTH = 10_000
"""Most characters of padding or indentation; most bits of an integer."""

_TOTAL = 60
"""How many texts of the largest size a rendering may create."""
_ITEM = 64
"""Characters charged for each item of a list or object, in addition to its text: more than its bytes in memory."""
_CONTAINERS = (list, tuple, dict, ItemsView, KeysView, ValuesView)


class Limits:
    """The remaining time and memory of one rendering."""

    def __init__(self, variables: Mapping[str, Any], seconds: float) -> None:
        """variables: the template's input, whose size sets the limits. seconds: CPU time, before 1 ms per message."""
        self._sizes: dict[int, tuple[Any, int]] = {}
        """Sizes of lists and objects by id, with the values themselves, so that no id is reused. Sandboxed templates
        cannot modify them."""
        given = sum(self.size(value) for value in variables.values())
        messages = variables.get("messages")
        count = len(messages) if isinstance(messages, list) else 1
        # A template may append the messages to a text one by one, which copies it each time.
        copied = 2 * count * given
        self._seconds = seconds + 0.001 * count + 1e-9 * copied
        self._deadline = time.thread_time() + self._seconds
        self._largest = MAX_SIZE + 4 * given
        self._left = _TOTAL * MAX_SIZE + _TOTAL * given + copied

    def charge(self, characters: int) -> None:
        """Count characters that were created; SecurityError if the total is too large, or the time is up."""
        self._left -= characters
        if self._left < 0:
            raise SecurityError("it makes too many texts and lists")
        if time.thread_time() > self._deadline:
            raise SecurityError(f"it takes more than {self._seconds:.3g} seconds")

    def sized(self, value: Any) -> Any:
        """`value`, which was just created; SecurityError if it is too large."""
        if isinstance(value, str | bytes):
            self.check(len(value))
            self.charge(len(value))
        elif isinstance(value, _CONTAINERS):
            self.check(self.size(value))
            self.charge(_ITEM + 8 * len(value))
        else:
            self.charge(0)
        return value

    def check(self, size: int) -> None:
        """SecurityError if a text or list of this size is too large."""
        if size > self._largest:
            raise SecurityError(f"it makes a text or list of more than {self._largest:,} characters")

    def check_items(self, value: Any) -> None:
        """SecurityError if a value is too large for a slow filter."""
        if isinstance(value, str | bytes | list | tuple | dict) and self.size(value) > MAX_ITEMS:
            raise SecurityError(f"it applies a slow filter to more than {MAX_ITEMS:,} characters")

    def check_printed(self, value: Any) -> None:
        """SecurityError if the text of a value would be too large."""
        if isinstance(value, Namespace):
            raise SecurityError("it prints a namespace")
        if isinstance(value, _CONTAINERS):
            self.check(self.size(value))

    def check_bits(self, bits: int) -> None:
        """SecurityError for an integer of too many bits."""
        if bits > MAX_WIDTH:
            raise SecurityError(f"it makes a number of more than {MAX_WIDTH:,} bits")

    def check_widths(self, values: list[Any]) -> None:
        """SecurityError if one of the values is a width that is too large."""
        if any((isinstance(v, int) and v > MAX_WIDTH) or (isinstance(v, str) and len(v) > MAX_ITEMS) for v in values):
            raise SecurityError(f"it pads or indents by more than {MAX_WIDTH:,} characters")

    def size(self, value: Any) -> int:
        """Approximate length of a value's text: a list that is contained several times counts each time."""
        if isinstance(value, str | bytes):
            return _ITEM + len(value)
        if isinstance(value, Namespace):  # its text may grow later
            raise SecurityError("it puts a namespace into a list")
        if not isinstance(value, _CONTAINERS):
            return _ITEM
        known = self._sizes.get(id(value))
        if known is None:
            parts = [part for item in value.items() for part in item] if isinstance(value, dict) else value
            known = self._sizes[id(value)] = value, _ITEM + sum(map(self.size, parts))
        return known[1]

    def depth(self, value: Any) -> int:
        """How deeply a value's lists and objects are nested."""
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return 1 + max(map(self.depth, parts)) if parts else 0
