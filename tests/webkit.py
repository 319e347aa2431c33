"""WebKitGTK, the engine of Safari, driven by WebDriver over HTTP; its windows are on a display without a screen."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from browser import SECONDS, Browser, Page
from webdriver import WATCH, key_actions, mouse_actions

_EVALUATE = """const done = arguments[arguments.length - 1];
(async () => (%s))().then((value) => done([true, value ?? null]), (error) => done([false, String(error)]));"""
_SEEN = """[(window.problems ?? []).splice(0), performance.getEntriesByType("resource").map((one) => one.name)]"""


class Driver:
    """A process of WebKitWebDriver with its one session: a browser, whose windows share cookies and storage."""

    def __init__(self, path: str, environment: dict[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [path, f"--port={self._port}"], env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)):
                break
            assert self._process.poll() is None, "WebKitWebDriver has ended"
            assert time.monotonic() < end, "WebKitWebDriver does not start"
            time.sleep(0.01)
        self._session = ""
        self._session = f"/session/{self._request('POST', '/session', {'capabilities': {}})['sessionId']}"
        self.first = str(self._request("GET", "/window"))
        self._window = self.first
        self._open = {self.first}

    def command(self, window: str, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The value that a command to the window gives."""
        if window != self._window:
            self._request("POST", "/window", {"handle": window})
            self._window = window
        return self._request(verb, path, body)

    def new_window(self) -> str:
        """The handle of another window."""
        window = str(self._request("POST", "/window/new", {"type": "window"})["handle"])
        self._open.add(window)
        return window

    def close(self, window: str) -> None:
        """Close a window; with the last, everything ends."""
        self._open.discard(window)
        if self._open:
            self.command(window, "DELETE", "/window")
            return
        self.end()

    def end(self) -> None:
        """Close all windows, and end the processes; no effect if that is done."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(AssertionError, OSError):
            self._request("DELETE", "")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _request(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(verb, self._session + path, None if body is None else json.dumps(body))
            value = json.loads(connection.getresponse().read())["value"]
        assert not (isinstance(value, dict) and "error" in value), f"{verb} {path}: {value}"
        return value


class WebKit(Browser):
    """A display on which every page that is opened has a browser of its own."""

    def __init__(self, path: str, place: Path) -> None:
        """path: WebKitWebDriver. place: a directory that does not exist yet."""
        place.mkdir(mode=0o700)
        read_end, write_end = os.pipe()
        self._display = subprocess.Popen(
            ["Xvfb", "-displayfd", str(write_end), "-screen", "0", "1600x1200x24", "-nolisten", "tcp"],
            pass_fds=[write_end], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(write_end)
        with open(read_end, encoding="ascii") as numbers:
            number = numbers.readline().strip()
        assert number, "Xvfb does not start"
        own = {"DISPLAY": f":{number}", "GDK_BACKEND": "x11", "HOME": str(place), "XDG_RUNTIME_DIR": str(place)}
        self._environment = {**os.environ, **own, "NO_AT_BRIDGE": "1", "LIBGL_ALWAYS_SOFTWARE": "1"}
        self._path = path
        self._drivers: list[Driver] = []

    @staticmethod
    def find() -> str | None:
        """The path of WebKitWebDriver where there is Xvfb too, or None."""
        return shutil.which("WebKitWebDriver") if sys.platform == "linux" and shutil.which("Xvfb") else None

    def open(self, url: str, width: int = 1280, height: int = 800, *, touch: bool = False) -> WebKitPage:
        driver = Driver(self._path, self._environment)
        self._drivers.append(driver)
        page = WebKitPage(driver, driver.first)
        page.resize(width, height)
        page.load(url)
        return page

    def open_beside(self, page: Page, url: str) -> WebKitPage:
        assert isinstance(page, WebKitPage)
        other = WebKitPage(page.driver, page.driver.new_window())
        other.load(url)
        return other

    def close(self) -> None:
        for driver in self._drivers:
            driver.end()
        self._display.terminate()
        self._display.wait()


class WebKitPage(Page):
    """A window of WebKit. Its problems and requests are known from the end of loading on."""

    def __init__(self, driver: Driver, window: str) -> None:
        super().__init__()
        self.driver = driver
        self._window = window

    def look(self) -> None:
        problems, requests = self.evaluate(_SEEN)
        self._problems += problems
        self._requests += [one for one in requests if not one.startswith("data:") and one not in self._requests]

    def _watch(self) -> None:
        self.evaluate(f"({WATCH})((problem) => (window.problems ??= []).push(problem))")

    def command(self, verb: str, path: str, **body: Any) -> Any:
        """The value that a command of the protocol gives in this page."""
        return self.driver.command(self._window, verb, path, body if verb == "POST" else None)

    def load(self, url: str) -> None:
        self.command("POST", "/url", url=url)
        self._watch()

    def reload(self) -> None:
        self.look()
        self.command("POST", "/refresh")
        self._watch()

    def evaluate(self, script: str) -> Any:
        good, value = self.command("POST", "/execute/async", script=_EVALUATE % script, args=[])
        assert good, value
        return value

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.command("POST", "/actions", actions=mouse_actions(kind, x, y))

    def type(self, text: str) -> None:
        self.command("POST", "/actions", actions=key_actions(text))

    def press(self, key: str, modifiers: int = 0) -> None:
        self.command("POST", "/actions", actions=key_actions([key], modifiers))

    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        sizes = [self._inner()]
        self.command("POST", "/window/rect", width=width, height=height)
        end = time.monotonic() + 5
        # The window changes some time after the command, if it is to change.
        while (len(sizes) < 3 or sizes[-1] == sizes[0] or sizes[-1] != sizes[-2]) and time.monotonic() < end:
            if sizes[-1] == [width, height]:
                return
            time.sleep(0.05)
            sizes.append(self._inner())
        inner = sizes[-1]  # less than the window, or more: it has a smallest width
        self.command("POST", "/window/rect", width=2 * width - inner[0], height=2 * height - inner[1])

    def _inner(self) -> Any:
        return self.evaluate("[innerWidth, innerHeight]")

    def screenshot(self, path: Path) -> None:
        # What was drawn last may be older than the page.
        self.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 50)))")
        path.write_bytes(base64.b64decode(self.command("GET", "/screenshot")))

    def close(self) -> None:
        self.driver.close(self._window)
