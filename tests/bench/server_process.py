"""An HTTP server in a process of its own, on 127.0.0.1, and what the system tells about it."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def serve_command(model: str | Path, *options: str) -> list[str]:
    """The command that serves a model with this interpreter's npqwen, without its port."""
    return [sys.executable, "-m", "npqwen", "serve", str(model), *options]


class ServerProcess:
    """A server that was started with `--port`, and answers GET /health with 200 once it is ready."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
        patience: float = 300,
    ) -> None:
        """Start it and wait until it is ready.

        log: the file that its output is appended to. port: any free one if it is None. environment: variables to set in
        addition to this process's. patience: seconds after which it counts as failed. Raises SystemExit if it fails.
        """
        self.port = free_port() if port is None else port
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        end = time.monotonic() + patience
        while self._health() != 200:
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                text = log.read_text(encoding="utf-8", errors="replace")
                raise SystemExit(f"{command[0]} does not serve:\n{text[-2000:]}")
            time.sleep(0.05)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def threads(self) -> int:
        """How many threads it has; 0 where the system does not tell."""
        return self._entries("task")

    @property
    def files(self) -> int:
        """How many files and connections it has open; 0 where the system does not tell."""
        return self._entries("fd")

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics, summed over models."""
        found: dict[str, float] = {}
        for name, value in _SAMPLE.findall(self._get("/metrics")[1]):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def stop(self) -> int:
        """End it by SIGTERM (on Windows at once); returns its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise SystemExit("the server does not end after SIGTERM") from None

    def kill(self) -> None:
        """End it at once, by SIGKILL."""
        self.process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        self.process.wait()

    def _health(self) -> int:
        try:
            return self._get("/health")[0]
        except (OSError, http.client.HTTPException):
            return 0

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def _entries(self, directory: str) -> int:
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/{directory}"))
        except OSError:
            return 0
