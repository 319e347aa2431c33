"""A headless Chromium that tests drive by the DevTools protocol over a pipe: no package and no port needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from browser import CONTROL, SECONDS, Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--lang=en",
    "--no-default-browser-check",
    "--no-first-run",
    "--password-store=basic",
    "--use-mock-keychain",
)
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for descriptor, end in zip((3, 4), ends):
    os.dup2(end, descriptor)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""A program that gives Chromium the pipe as its descriptors 3 and 4."""
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowUp": (38, ""), "Tab": (9, ""), "Backspace": (8, "")}


class Chromium(Browser):
    """A running Chromium. Every page has cookies, storage and cache of its own."""

    def __init__(self, path: str, profile: Path) -> None:
        """profile: a directory that does not exist yet."""
        read_end, self._write = os.pipe()
        self._read, write_end = os.pipe()
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        command = [path, *_OPTIONS, *root, f"--user-data-dir={profile}", "about:blank"]
        for descriptor in (read_end, write_end):
            os.set_inheritable(descriptor, True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(read_end), str(write_end), *command],
            pass_fds=(read_end, write_end), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_end)
        os.close(write_end)
        self._seen = b""
        self._last_id = 0
        self._results: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, ChromiumPage] = {}
        self.command("Browser.getVersion")

    @staticmethod
    def find() -> str | None:
        """The path of a Chromium or Chrome that can be driven by a pipe, or None."""
        if sys.platform == "win32":
            return None
        found = next((path for name in NAMES if (path := shutil.which(name))), None)
        if found is None and sys.platform == "darwin":
            application = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
            found = application if os.access(application, os.X_OK) else None
        return found

    def open(self, url: str, width: int = 1280, height: int = 800, *, touch: bool = False) -> ChromiumPage:
        context = self.command("Target.createBrowserContext")["browserContextId"]
        page = ChromiumPage(self, context)
        page.resize(width, height, touch=touch)
        page.load(url)
        return page

    def open_beside(self, page: Page, url: str) -> ChromiumPage:
        assert isinstance(page, ChromiumPage)
        other = ChromiumPage(self, page.context)
        other.load(url)
        return other

    def attach(self, page: ChromiumPage) -> tuple[str, str]:
        """A new target in the page's context: its id, and the session that talks to it."""
        target = self.command("Target.createTarget", url="about:blank", browserContextId=page.context)["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._pages[session] = page
        return target, session

    def command(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Run a command of the protocol and return its result. Events that come meanwhile go to their pages."""
        self._last_id += 1
        id = self._last_id
        message = {"id": id, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._write, rest) :]
        end = time.monotonic() + SECONDS
        while id not in self._results:
            self.receive(end - time.monotonic(), method)
        result = self._results.pop(id)
        assert "error" not in result, f"{method}: {result['error']}"
        return result["result"]

    def receive(self, seconds: float, what: str) -> None:
        """Wait for one message or more."""
        ready, _, _ = select.select([self._read], [], [], max(0.0, seconds))
        assert ready, f"the browser does not answer: {what}"
        piece = os.read(self._read, 1 << 20)
        assert piece, "the browser has ended"
        *messages, self._seen = (self._seen + piece).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._results[message["id"]] = message
            elif message.get("sessionId") in self._pages:
                self._pages[message["sessionId"]].hear(message["method"], message["params"])

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.command("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._read)
        os.close(self._write)


class ChromiumPage(Page):
    """A tab of Chromium."""

    def __init__(self, browser: Chromium, context: str) -> None:
        super().__init__()
        self.context = context
        self._browser = browser
        self._loaded = False
        self._target, self._session = browser.attach(self)
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> Any:
        """Run a command of the protocol in this page."""
        return self._browser.command(method, self._session, **parameters)

    def hear(self, method: str, event: dict[str, Any]) -> None:
        """Take note of an event."""
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and event["entry"]["source"] == "security":
            self.problems.append(event["entry"]["text"])
        elif method == "Audits.issueAdded" and event["issue"]["code"] == "ContentSecurityPolicyIssue":
            self.problems.append(json.dumps(event["issue"]["details"]))
        elif method == "Network.requestWillBeSent" and not event["request"]["url"].startswith("data:"):
            self.requests.append(event["request"]["url"])

    def load(self, url: str) -> None:
        self._wait_for_load(lambda: self.command("Page.navigate", url=url))

    def reload(self) -> None:
        self._wait_for_load(lambda: self.command("Page.reload"))

    def _wait_for_load(self, start: Callable[[], object]) -> None:
        self._loaded = False
        start()
        end = time.monotonic() + SECONDS
        while not self._loaded:
            self._browser.receive(end - time.monotonic(), "load")

    def evaluate(self, script: str) -> Any:
        answer = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        if kind == "mouseMoved":  # a tab behind another one takes 5 s to answer
            self.command("Page.bringToFront")
        self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def type(self, text: str) -> None:
        self.command("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        code, text = _KEYS.get(key, (ord(key[0].upper()), key))
        event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        down = {"type": "keyDown", "text": text} if text and not modifiers & CONTROL else {"type": "rawKeyDown"}
        self.command("Input.dispatchKeyEvent", **event, **down)
        self.command("Input.dispatchKeyEvent", **event, type="keyUp")

    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=touch, deviceScaleFactor=1
        )
        self.command("Emulation.setTouchEmulationEnabled", enabled=touch)

    def prefer(self, **features: str) -> None:
        """Media features, such as prefer(prefers_color_scheme="dark")."""
        values = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.command("Emulation.setEmulatedMedia", features=values)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._browser.command("Target.closeTarget", targetId=self._target)
        self._browser.command("Target.disposeBrowserContext", browserContextId=self.context)
