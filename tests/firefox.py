"""A headless Firefox that tests drive by WebDriver BiDi: JSON over a WebSocket on a port of this machine."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from browser import SECONDS, Browser, Page
from webdriver import WATCH, key_actions, mouse_actions

NAMES = ("firefox-esr", "firefox")
_PREFERENCES: dict[str, bool | int | str] = {
    "app.normandy.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.safebrowsing.downloads.enabled": False,
    "browser.safebrowsing.malware.enabled": False,
    "browser.safebrowsing.phishing.enabled": False,
    "browser.search.update": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "extensions.getAddons.cache.enabled": False,
    "extensions.systemAddon.update.enabled": False,
    "intl.accept_languages": "en",
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "network.dns.localDomains": "",
    "network.prefetch-next": False,
    "services.settings.server": "data:,",
    "toolkit.telemetry.reportingpolicy.firstRun": False,
    "ui.prefersReducedMotion": 1,
}


class WebSocket:
    """The client's end of a WebSocket (RFC 6455) that carries text in both directions."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), SECONDS)
        self._seen = b""
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        try:
            head = self._until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101"), head
        except BaseException:
            self.close()
            raise

    def send(self, text: str) -> None:
        """Send a message in one frame."""
        data, mask = text.encode(), os.urandom(4)  # Firefox refuses a mask of zeros
        if len(data) < 126:
            size = struct.pack(">B", 0x80 | len(data))
        elif len(data) < 1 << 16:
            size = struct.pack(">BH", 0x80 | 126, len(data))
        else:
            size = struct.pack(">BQ", 0x80 | 127, len(data))
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
        self._socket.sendall(b"\x81" + size + mask + masked)

    def receive(self) -> str:
        """The next message."""
        message = b""
        while True:
            first, size = self._take(2)
            if size == 126:
                (size,) = struct.unpack(">H", self._take(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", self._take(8))
            data = self._take(size)
            assert first & 0xF in (0, 1), f"not a frame of text: {first:x}"
            message += data
            if first & 0x80:
                return message.decode()

    def close(self) -> None:
        self._socket.close()

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._seen:
            self._read()
        head, _, self._seen = self._seen.partition(mark)
        return head

    def _take(self, count: int) -> bytes:
        while len(self._seen) < count:
            self._read()
        taken, self._seen = self._seen[:count], self._seen[count:]
        return taken

    def _read(self) -> None:
        piece = self._socket.recv(1 << 20)
        assert piece, "the browser has ended"
        self._seen += piece


class Firefox(Browser):
    """A running Firefox. Every page that is opened has cookies and storage of its own."""

    def __init__(self, path: str, profile: Path) -> None:
        """profile: a directory that does not exist yet."""
        profile.mkdir()
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in _PREFERENCES.items()]
        (profile / "user.js").write_text("\n".join(lines), encoding="utf-8")
        self._process = subprocess.Popen(
            [path, "--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", "0"],
            env={**os.environ, "HOME": str(profile)}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._last_id = 0
        self._pages: dict[str, FirefoxPage] = {}
        try:
            self._socket = WebSocket(self._port(profile / "WebDriverBiDiServer.json"), "/session")
            self.command("session.new", capabilities={})
            self.command("session.subscribe", events=["script.message", "network.beforeRequestSent"])
        except BaseException:
            self._kill()
            raise

    @staticmethod
    def find() -> str | None:
        """The path of a Firefox, or None."""
        return None if sys.platform == "win32" else next(filter(None, map(shutil.which, NAMES)), None)

    def _port(self, file: Path) -> int:
        """The port that Firefox has written there, once it has."""
        end = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError, ValueError):
                return int(json.loads(file.read_text(encoding="utf-8"))["ws_port"])
            assert self._process.poll() is None, "Firefox has ended"
            assert time.monotonic() < end, "Firefox does not start"
            time.sleep(0.02)

    def open(self, url: str, width: int = 1280, height: int = 800, *, touch: bool = False) -> FirefoxPage:
        page = FirefoxPage(self, self.command("browser.createUserContext")["userContext"])
        page.resize(width, height)
        page.load(url)
        return page

    def open_beside(self, page: Page, url: str) -> FirefoxPage:
        assert isinstance(page, FirefoxPage)
        other = FirefoxPage(self, page.user_context)
        other.load(url)
        return other

    def attach(self, page: FirefoxPage) -> str:
        """A new window in the page's context: its id."""
        context = self.command("browsingContext.create", type="window", userContext=page.user_context)["context"]
        self._pages[context] = page
        return str(context)

    def command(self, method: str, **parameters: Any) -> Any:
        """Run a command of the protocol and return its result. Events that come meanwhile go to their pages."""
        self._last_id += 1
        self._socket.send(json.dumps({"id": self._last_id, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.receive())
            if message["type"] == "event":
                self._hear(message["method"], message["params"])
            elif message["id"] == self._last_id:
                assert message["type"] == "success", f"{method}: {message.get('message')}"
                return message["result"]

    def _hear(self, method: str, event: dict[str, Any]) -> None:
        page = self._pages.get(event["source"]["context"] if method == "script.message" else event["context"])
        if page is None:
            return
        if method == "script.message":
            page.problems.append(event["data"]["value"])
        elif not event["request"]["url"].startswith("data:"):
            page.requests.append(event["request"]["url"])

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.command("browser.close")
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class FirefoxPage(Page):
    """A window of Firefox."""

    def __init__(self, browser: Firefox, user_context: str) -> None:
        super().__init__()
        self.user_context = user_context
        self._browser = browser
        self._context = browser.attach(self)
        channel = {"type": "channel", "value": {"channel": "problems"}}
        browser.command(
            "script.addPreloadScript", functionDeclaration=WATCH, arguments=[channel], contexts=[self._context]
        )

    def command(self, method: str, **parameters: Any) -> Any:
        """Run a command of the protocol in this page."""
        return self._browser.command(method, context=self._context, **parameters)

    def load(self, url: str) -> None:
        self.command("browsingContext.navigate", url=url, wait="complete")

    def reload(self) -> None:
        self.command("browsingContext.reload", wait="complete")

    def evaluate(self, script: str) -> Any:
        expression = f"(async () => JSON.stringify(await ({script}) ?? null))()"
        target = {"context": self._context}
        answer = self._browser.command("script.evaluate", expression=expression, target=target, awaitPromise=True)
        assert answer["type"] == "success", answer["exceptionDetails"]["text"]
        return json.loads(answer["result"]["value"])

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.command("input.performActions", actions=mouse_actions(kind, x, y))

    def type(self, text: str) -> None:
        self.command("input.performActions", actions=key_actions(text))

    def press(self, key: str, modifiers: int = 0) -> None:
        self.command("input.performActions", actions=key_actions([key], modifiers))

    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        self.command("browsingContext.setViewport", viewport={"width": width, "height": height})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.command("browsingContext.captureScreenshot")["data"]))

    def close(self) -> None:
        self.command("browsingContext.close")
