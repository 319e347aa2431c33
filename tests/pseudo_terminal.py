"""`npqwen chat` in a real terminal that tests type into and read from."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHILD = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from npqwen.model import Model
forward = Model.forward
def slow(*args, **options):
    time.sleep(float(sys.argv[1]))
    return forward(*args, **options)
Model.forward = slow
from npqwen.commands.cli import main
main(sys.argv[2:])
"""


class PseudoTerminal:
    """`npqwen chat` with a small model in a terminal, each pass of it slowed down by `seconds`.

    cache: its NPQWEN_CACHE, apart from the compiled kernels. environment: variables to add.
    """

    def __init__(self, model: Path, cache: Path, *arguments: str, seconds: float = 0.05, **environment: str) -> None:
        import pty

        self.master, self.slave = pty.openpty()
        kernels = cache / "kernels"
        if not os.path.lexists(kernels):
            cache.mkdir(exist_ok=True)
            kernels.symlink_to(Path(os.environ["NPQWEN_CACHE"]) / "kernels")
        variables = os.environ | {"TERM": "xterm", "NPQWEN_CACHE": str(cache)} | environment
        variables.pop("NO_COLOR", None)
        options = ["chat", str(model), "--threads", "1", "--temperature", "0", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(seconds), *options],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True, env=variables,
        )  # fmt: skip
        self._seen = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """Everything written up to the text."""
        end = time.monotonic() + seconds
        while text not in self._seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} after {self._seen!r}"
            self._seen += os.read(self.master, 4096).decode("utf-8", "replace")
        at = self._seen.index(text) + len(text)
        before, self._seen = self._seen[:at], self._seen[at:]
        return before

    def prompt(self) -> str:
        """Everything up to the next prompt: it is ready when bracketed paste is on and the cursor visible."""
        return self.until("\x1b[?2004h") + self.until("\x1b[?25h")

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def settings(self) -> list[Any]:
        import termios

        return termios.tcgetattr(self.slave)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)
