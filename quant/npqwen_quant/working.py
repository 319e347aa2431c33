"""Working directories: what an interrupted conversion has done, beside its output, for the next one to resume."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from npqwen.atomic_file import writing
from npqwen.errors import CheckpointError, OutputError
from npqwen_quant.output import try_lock


@contextlib.contextmanager
def working_directory(out: Path, kind: str, key: str) -> Iterator[Path]:
    """A hidden directory beside `out` for what has been done so far, of this process alone.

    kind: part of its name. key: what the work depends on; the next call with the same key finds the directory again.
    It is removed on leaving, but after an interruption it stays, to be resumed. What interrupted conversions of this
    kind to the same place have left under other keys is removed.
    """
    path = out.with_name(f".{out.name}.{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "wb")  # noqa: SIM115
    with lock:
        if not try_lock(lock):
            raise OutputError(f"{out} is being converted by another process ({kind}); wait until it ends")
        for other in path.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            if other != path:
                _remove_abandoned(other)
        try:
            yield path
        except CheckpointError:  # of no use any more
            shutil.rmtree(path, ignore_errors=True)
            raise
    shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    """Remove a working directory, unless its process lives."""
    with contextlib.suppress(OSError), open(directory / "lock", "r+b") as lock:
        if try_lock(lock):
            shutil.rmtree(directory, ignore_errors=True)
