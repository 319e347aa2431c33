"""Reasoning as an opaque string, which a client keeps for the next request without showing it."""

from __future__ import annotations

import base64
import binascii

_PREFIX = "npqwen."
_PLACEHOLDER = "npqwen"
"""The signature of reasoning that the client has as text: some clients drop reasoning without one."""


def pack(reasoning: str) -> str:
    """A string of ASCII characters from which `unpack` restores the reasoning."""
    return _PREFIX + base64.b64encode(reasoning.encode()).decode()


def placeholder() -> str:
    """A string without content, for where a client expects an opaque one."""
    return _PLACEHOLDER


def unpack(text: str) -> str | None:
    """The reasoning that `pack` encoded; None for any other string, such as another server's signature."""
    if not text.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(text[len(_PREFIX) :].encode(), validate=True).decode()
    except (binascii.Error, ValueError):
        return None
