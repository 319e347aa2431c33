"""What the classic WebDriver and BiDi share: actions of keys and the mouse, and what watches a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from browser import CONTROL, SHIFT

_KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "ArrowUp": "\ue013", "Tab": "\ue004", "Backspace": "\ue003"}
_MODIFIERS = {SHIFT: "\ue008", CONTROL: "\ue009"}

WATCH = """(report) => {
    addEventListener("error", (event) => report(event.message));
    addEventListener("unhandledrejection", (event) => report(String(event.reason)));
    addEventListener("securitypolicyviolation", (event) => report(`${event.violatedDirective}: ${event.blockedURI}`));
}"""
"""A function of JavaScript that reports uncaught exceptions and violations of the policy from now on."""


def key_actions(keys: Iterable[str], modifiers: int = 0) -> list[dict[str, Any]]:
    """Press and release each key (a character, or a name such as "Enter") while the modifiers are held."""
    held = [key for bit, key in _MODIFIERS.items() if modifiers & bit]
    actions = [{"type": "keyDown", "value": key} for key in held]
    for key in keys:
        value = _KEYS.get(key, key)
        actions += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
    actions += [{"type": "keyUp", "value": key} for key in reversed(held)]
    return [{"type": "key", "id": "keyboard", "actions": actions}]


def mouse_actions(kind: str, x: float, y: float) -> list[dict[str, Any]]:
    """One of "mouseMoved", "mousePressed", "mouseReleased" at a place of the viewport."""
    action: dict[str, Any] = {"type": "pointerMove", "x": round(x), "y": round(y)}
    if kind != "mouseMoved":
        action = {"type": "pointerDown" if kind == "mousePressed" else "pointerUp", "button": 0}
    return [{"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [action]}]
