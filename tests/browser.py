"""What tests do in a page of a browser, whichever engine shows it."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""How long anything may take before a test fails."""
SHIFT, CONTROL = 8, 2


class Browser(ABC):
    """A running browser. Every page that is opened has cookies, storage and cache of its own."""

    @abstractmethod
    def open(self, url: str, width: int = 1280, height: int = 800, *, touch: bool = False) -> Page:
        """A page of the URL, fully loaded, in a new context. touch: as on a phone, where the engine can do that."""

    @abstractmethod
    def open_beside(self, page: Page, url: str) -> Page:
        """A page of the URL, fully loaded, that shares cookies and storage with another."""

    @abstractmethod
    def close(self) -> None:
        """End the browser and all its processes."""


class Page(ABC):
    """A tab: what tests do in it, and what went wrong in it."""

    def __init__(self) -> None:
        self._problems: list[str] = []
        self._requests: list[str] = []

    @property
    def problems(self) -> list[str]:
        """What went wrong: uncaught exceptions and violations of the Content-Security-Policy."""
        self.look()
        return self._problems

    @property
    def requests(self) -> list[str]:
        """All URLs that were requested, in order."""
        self.look()
        return self._requests

    def look(self) -> None:  # noqa: B027  most need not do anything
        """Take note of problems and requests, in an engine that does not tell of them as they come."""

    @abstractmethod
    def load(self, url: str) -> None:
        """Go to the URL and wait until it is loaded."""

    @abstractmethod
    def reload(self) -> None:
        """Load the page again."""

    @abstractmethod
    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited. An exception fails the test."""

    @abstractmethod
    def mouse(self, kind: str, x: float, y: float) -> None:
        """An event of the mouse's left button: "mouseMoved", "mousePressed" or "mouseReleased"."""

    @abstractmethod
    def type(self, text: str) -> None:
        """Enter text where the focus is."""

    @abstractmethod
    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key; modifiers: SHIFT, CONTROL."""

    @abstractmethod
    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        """Change the viewport."""

    @abstractmethod
    def screenshot(self, path: Path) -> None:
        """Write what is to be seen as PNG."""

    @abstractmethod
    def close(self) -> None:
        """Close the page and forget its context."""

    def until(self, condition: str) -> Any:
        """Wait until an expression is true. Returns its value."""
        end = time.monotonic() + SECONDS
        while True:
            value = self.evaluate(condition)
            if value:
                return value
            assert time.monotonic() < end, f"never: {condition}\n{self.text('body')}"
            time.sleep(0.01)

    def text(self, selector: str) -> str:
        """The visible text of the last element that matches, "" if there is none."""
        find = f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)"
        return str(self.evaluate(f"{find}?.innerText.trim() ?? ''"))

    def until_text(self, selector: str, text: str) -> None:
        """Wait until the last element that matches contains the text."""
        find = f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)"
        self.until(f"{find}?.innerText.includes({json.dumps(text)})")

    def count(self, selector: str) -> int:
        """How many elements match."""
        return int(self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def click(self, selector: str) -> None:
        """Click at the middle of the last visible element that matches, once there is one."""
        place = self.hover(selector)
        self.mouse("mousePressed", *place)
        self.mouse("mouseReleased", *place)

    def hover(self, selector: str) -> tuple[float, float]:
        """Move the mouse to the middle of the last visible element that matches, once there is one."""
        find = f"[...document.querySelectorAll({json.dumps(selector)})].filter((one) => one.checkVisibility()).at(-1)"
        self.until(f"Boolean({find})")
        place = self.evaluate(f"""(() => {{
            const one = {find};
            one.scrollIntoView({{block: "nearest"}});
            const box = one.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        self.mouse("mouseMoved", *place)
        return place[0], place[1]

    def fill(self, selector: str, text: str) -> None:
        """Replace the text of a field."""
        self.evaluate(f"(() => {{ const one = document.querySelector({json.dumps(selector)}); "
                      "one.focus(); one.select(); })()")  # fmt: skip
        if text:
            self.type(text)
        else:
            self.press("Backspace")

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select element."""
        self.evaluate(f"(() => {{ const one = document.querySelector({json.dumps(selector)}); "
                      f"one.value = {json.dumps(value)}; "
                      "for (const kind of ['input', 'change']) one.dispatchEvent(new Event(kind, {bubbles: true})); "
                      "})()")  # fmt: skip
