"""A second process that compiles kernels beside the command, on a machine's first run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from npqwen.hardware.machine import usable_cpus

_PROGRAM = "import sys; sys.path[:] = {path!r}; from npqwen.engine.compile_entries import main; main()"
"""The search path is the command's own: Python's default would find modules in the current directory."""


class CompileHelper:
    """Follows the compilation of a model's kernels as `on_compile`, and has another process compile some of them.

    It starts with the first kernel that is not in the cache, if kernels can be stored there and there is a second CPU,
    and ends when the model is loaded, or with this process. Nothing depends on it: what it does not compile, this
    process does.
    """

    def __init__(self, path: Path, kv: str | None, report: Callable[[int, int], None]) -> None:
        """path, kv: the converted directory and its cache type, None for the default. report: receives the progress."""
        self._arguments = [str(path), *([] if kv is None else [kv])]
        self._report = report
        self._started = False
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, done: int, total: int) -> None:
        if not self._started:
            self._started = True
            self._start()
        if done == total:
            self._end()
        self._report(done, total)

    def _start(self) -> None:
        from npqwen.kernels.compiled import is_writable  # loaded by now: it imports Numba

        if usable_cpus() < 2 or not sys.executable or not is_writable():
            return
        program = [sys.executable, "-c", _PROGRAM.format(path=sys.path), *self._arguments]
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
