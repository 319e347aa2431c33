"""Signals during `npqwen convert`: the process ends by them, and what is of no use is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_config, write_checkpoint

CHILD = """
import sys, time
import npqwen_quant.steps, npqwen_quant.writer
from npqwen.commands.cli import main
from npqwen.terminal.terminal import Terminal
if sys.argv.pop(1) == "long":
    npqwen_quant.writer.SYNC_BYTES, npqwen_quant.steps.WEIGHTS = 1, 3000
def wait(done, total):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(60)
Terminal.progress = lambda self, task: wait
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_conversion_in_order(tmp_path: Path, name: str, length: str) -> None:
    """What a long conversion has done stays, and is told; of a short one nothing."""
    write_checkpoint(tmp_path / "in", make_config(vocab_size=4128), tokenizer=True)
    command = [sys.executable, "-c", CHILD, length, "convert", str(tmp_path / "in"), str(tmp_path / "out")]
    environment = os.environ | {"NPQWEN_CACHE": str(tmp_path / "cache")}
    number = getattr(signal, name)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == (130 if name == "SIGINT" else -number)
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("in", "cache")]
    told = "the next conversion with the same arguments resumes it" in errors
    assert (len(left), told) == ((0, False) if length == "short" else (1, True))
    assert "Traceback" not in errors
