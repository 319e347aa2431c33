"""Benchmarks of several contenders that take turns: what versus_llama.py, versus_openvino.py, versus_commit.py and
page_cache.py share.

Each contender is loaded in a process of its own (engine.py) and sleeps on its pipe while another is measured, so that a
machine whose speed drifts slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from npqwen.hardware.machine import processor

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Path(__file__).with_name("engine.py")
SETTLE_SECONDS = 0.25
"""Pause before each measurement: LLVM's OpenMP (llama.cpp) lets idle threads spin for 0.2 s."""
Measure = tuple[str, int, dict[str, Any], dict[str, Any]]
"""A row's name, its tokens, the request to an engine, and a smaller request to warm up with."""


class Worker:
    """A process that measures on request. Requests and answers are JSON lines."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """name: for messages. environment: variables to set in addition to this process's."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=None if environment is None else {**os.environ, **environment},
        )
        self._name = name
        self.pid = self._process.pid
        self.about = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self._name} engine ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class Child(Worker):
    """An engine of engine.py in its own process."""

    def __init__(
        self,
        kind: str,
        model: Path,
        threads: int,
        context: int,
        flash: str = "on",
        mapped: bool = False,
        launcher: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """kind: "npqwen" or "llama". mapped: keep llama.cpp from copying weights. launcher: a command prefix.

        environment: variables to set in addition to this process's.
        """
        command = [*launcher, sys.executable, str(ENGINE), "serve", kind, str(model)]
        command += ["--threads", str(threads), "--context", str(context), "--flash", flash]
        super().__init__(kind, command + (["--mapped"] if mapped else []), environment)


@dataclass
class Result:
    """One row: a measure and each contender's seconds in every round."""

    bits: int
    threads: int
    name: str
    tokens: int
    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]

    def fastest(self, rivals: Iterable[str]) -> str:
        """The contender with the best median."""
        return min(rivals, key=lambda name: median(self.seconds[name]))

    def cpu_share(self, contender: str) -> float:
        """Part of its threads' time that the contender had a CPU."""
        return cpu_share(self.seconds[contender], self.cpu_seconds[contender], self.threads)

    def ratio(self, rival: str) -> float:
        """npqwen's median speed over the rival's."""
        return median(self.seconds[rival]) / median(self.seconds["npqwen"])


def new_result(bits: int, threads: int, name: str, tokens: int, contenders: Iterable[str]) -> Result:
    """A row without rounds."""
    names = list(contenders)
    return Result(bits, threads, name, tokens, {key: [] for key in names}, {key: [] for key in names})


def take_turns(children: Mapping[str, Worker], request: Mapping[str, Any], rounds: int) -> Iterator[tuple[str, Any]]:
    """Every child's answer in every round, by name. Every second round runs backwards."""
    for number in range(rounds):
        for name in list(children)[:: -1 if number % 2 else 1]:
            time.sleep(SETTLE_SECONDS)
            yield name, children[name].ask(**request)


def measures(prefill: Sequence[int], decode: int, depths: Sequence[int], batch: Sequence[int]) -> Iterator[Measure]:
    """The rows of a benchmark, in the order that refills caches least.

    prefill: prompt lengths. decode: tokens decoded one by one at each depth (0: none). depths: tokens in the cache
    before. batch: tokens of single passes with all logits, at the least depth.
    """
    for tokens in sorted(prefill):
        request = {"measure": "prefill", "tokens": tokens}
        yield f"prefill {tokens}", tokens, request, request | {"tokens": min(tokens, 512)}
    for depth in sorted(depths, reverse=True) if decode else []:
        request = {"measure": "decode", "tokens": decode, "depth": depth}
        yield f"decode {decode} at {depth}", decode, request, request | {"tokens": 4}
    for tokens in batch:
        depth = min(depths, default=0)
        request = {"measure": "batch", "tokens": tokens, "depth": depth, "passes": 16}
        yield f"one pass of {tokens} at {depth}", tokens, request, request | {"passes": 2}


def context_for(prefill: Sequence[int], decode: int, depths: Sequence[int], batch: Sequence[int]) -> int:
    """Tokens that the longest of `measures` needs room for."""
    longest = max([*prefill, *(depth + decode for depth in depths)], default=0)
    return max(longest + max(batch, default=0), 512)


def put_out_of_memory(model: Path) -> None:
    """Drop a file's, or a directory's files', pages from the page cache, where the system can (POSIX)."""
    if hasattr(os, "posix_fadvise"):
        for path in [model] if model.is_file() else model.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cpu_share(seconds: Sequence[float], cpu_seconds: Sequence[float], threads: int) -> float:
    """Part of its threads' time that a contender had a CPU, in the median round. Below 1, other programs ran."""
    return median(cpu / (wall * threads) for cpu, wall in zip(cpu_seconds, seconds, strict=True))


def speed_cell(tokens: int, seconds: Sequence[float]) -> str:
    """Median and range in tokens a second."""
    middle, low, high = (
        f"{tokens / value:.0f}" if tokens > 1000 * value else f"{tokens / value:.4g}"
        for value in (median(seconds), max(seconds), min(seconds))
    )
    return f"{middle} ({low}-{high})"


def seconds_cell(seconds: Sequence[float]) -> str:
    """Median and range in seconds."""
    return f"{median(seconds):.4g} ({min(seconds):.4g}-{max(seconds):.4g}) s"


def add_measure_options(parser: argparse.ArgumentParser, *, batch: bool = True) -> None:
    """The command line's options for `measures`. batch: also the one for short passes."""
    parser.add_argument("--threads", type=counts, default=[os.cpu_count() or 1])
    parser.add_argument("--prefill", type=counts, default=[512], help="prompt lengths")
    parser.add_argument("--decode", type=int, default=64, help="tokens to decode; 0 for none")
    parser.add_argument("--depth", type=counts, default=[0], help="tokens already in the cache")
    if batch:
        parser.add_argument("--batch", type=counts, default=[], help="tokens in one short pass, such as 1,2,4,8")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of every measurement")
    parser.add_argument("--restarts", type=int, default=1, help="how often to repeat everything with new processes")


def add_checkpoint_options(parser: argparse.ArgumentParser, bits: Sequence[int]) -> None:
    """The command line's options for benchmarks that convert a checkpoint for several engines; bits: the default."""
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face Qwen3 checkpoint directory")
    parser.add_argument("--work", type=Path, help="directory of the converted models (build/bench/NAME)")
    parser.add_argument("--bits", type=counts, default=list(bits))
    parser.add_argument("--json", type=Path, help="write every round's seconds to this file")


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, bits: Collection[int]
) -> argparse.Namespace:
    """The options of `add_checkpoint_options` and `add_measure_options`, checked; bits: those that there are."""
    options = parser.parse_args(arguments)
    if not options.checkpoint.is_dir():
        parser.error(f"{options.checkpoint} is not a directory")
    if set(options.bits) - set(bits):
        parser.error(f"--bits takes {', '.join(map(str, bits))}")
    if min([options.repeat, options.restarts, *options.threads]) < 1:
        parser.error("--repeat, --restarts and --threads start at 1")
    if options.work is None:
        options.work = ROOT / "build" / "bench" / options.checkpoint.resolve().name
    return options


def machine_lines(checkpoint: Path, about: Mapping[str, Any]) -> list[str]:
    """The first lines of a report: the model, the machine and the engines."""
    return [
        f"Model: {checkpoint.name}. CPU: {processor()}, {os.cpu_count()} logical cores. "
        f"{platform.system()}, Python {platform.python_version()}.",
        *(f"{key}: {value}. " for key, value in about.items() if isinstance(value, str)),
    ]


def write_rounds(path: Path, checkpoint: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write all rounds of a benchmark as JSON."""
    record = {
        "checkpoint": checkpoint.name,
        "cpu": processor(),
        "about": about,
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(record, indent=2), encoding="utf-8")


def progress(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


def counts(text: str) -> list[int]:
    """A comma-separated list of whole numbers, which may be empty."""
    return [int(part) for part in text.split(",") if part]
