#!/usr/bin/env python3
"""Compare the speed of two checkouts of npqwen on one checkpoint, in one interleaved run.

    git worktree add ../before HEAD~1
    python tests/bench/versus_commit.py ../before . CHECKPOINT --threads 1,2 --depth 0,4096 --batch 4 --isa default,avx2

Each checkout converts the checkpoint with its own code into a directory of its own, and is measured in a process of its
own that imports only that checkout; the two take turns at every measurement. Where both conversions wrote the same
bytes, both map one file: on a virtual machine, the place of a file in memory moves decoding speed by up to a third.

Prints a Markdown table: medians and ranges, the median of the rounds' ratios (above 1, the new checkout is faster),
the ratio of the two best rounds, which other programs disturbed least, and that of the least CPU times, which with one
thread hardly depends on other programs. With --start, also the seconds of a process's start: imports, the command
line's help, the first token with compiled kernels and with none in the cache.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from interleave import (
    ENGINE,
    Child,
    add_measure_options,
    context_for,
    counts,
    cpu_share,
    measures,
    progress,
    put_out_of_memory,
    seconds_cell,
    speed_cell,
    take_turns,
)

from npqwen.format.recipe import RECIPES
from npqwen.hardware.machine import processor

CONVERT = "import sys; from pathlib import Path; from npqwen_quant import convert; " + (
    "convert(Path(sys.argv[1]), Path(sys.argv[2]), bits=int(sys.argv[3]))"
)
COMPILING_ROUNDS = 3
HEADER = (
    "| weights | kernels | threads | measure | old | new | new/old | best rounds' | CPU time's | CPU share, old/new |\n"
    "|---|---|---:|---|---|---|---:|---:|---:|---|"
)


@dataclass
class Tree:
    """One of the two checkouts."""

    name: str
    path: Path
    work: Path
    """Place of both checkouts' models and bytecode."""
    model: Path = Path()
    """The converted directory."""

    def environment(self, isa: str = "default") -> dict[str, str]:
        """Variables that make a Python process import this checkout's packages, and choose the kernels."""
        found = {
            "PYTHONPATH": os.pathsep.join([str(self.path), str(self.path / "quant")]),
            # Bytecode is cached, whatever this environment says.
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(self.work / "bytecode"),
        }
        return found if isa == "default" else {**found, "NPQWEN_ISA": isa}

    def run(self, command: Sequence[str], **variables: str) -> str:
        """Output of a Python process of this checkout."""
        environment = {**os.environ, **self.environment(), **variables}
        # Python's -c looks for packages in the working directory first.
        return subprocess.run(
            [sys.executable, *command], cwd=self.path, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def check(self) -> None:
        """End the program unless processes import this checkout."""
        imported = Path(self.run(["-c", "import npqwen; print(npqwen.__file__)"]).strip())
        if self.path not in imported.parents:
            raise SystemExit(f"{self.path} is not a checkout of npqwen: its processes import {imported}")

    def commit(self) -> str:
        """The checkout's commit, with a + if files were changed since."""
        git = ["git", "-C", str(self.path)]
        done = subprocess.run([*git, "describe", "--always", "--dirty=+"], capture_output=True, text=True)
        return done.stdout.strip() or "unknown"


@dataclass
class Row:
    """One measure and both checkouts' seconds in every round."""

    weights: str
    isa: str
    threads: int
    name: str
    tokens: int
    """0 for a measure in seconds."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"old": [], "new": []})
    cpu_seconds: dict[str, list[float]] = field(default_factory=lambda: {"old": [], "new": []})

    def text(self) -> str:
        """A row of the Markdown table."""
        cells = [speed_cell(self.tokens, s) if self.tokens else seconds_cell(s) for s in self.seconds.values()]
        ratio = median(old / new for old, new in zip(self.seconds["old"], self.seconds["new"], strict=True))
        best = min(self.seconds["old"]) / min(self.seconds["new"])
        cpu_ratio = ""
        if any(self.cpu_seconds["new"]):
            cpu_ratio = f"{min(self.cpu_seconds['old']) / min(self.cpu_seconds['new']):.3f}"
        shares = [cpu_share(self.seconds[key], cpu, self.threads) for key, cpu in self.cpu_seconds.items() if cpu]
        columns = [self.weights, self.isa, str(self.threads), self.name, *cells]
        columns += [f"{ratio:.3f}", f"{best:.3f}", cpu_ratio, " / ".join(f"{share:.2f}" for share in shares)]
        return "| " + " | ".join(columns) + " |"


def convert(trees: Sequence[Tree], checkpoint: Path, bits: int) -> None:
    """Both checkouts' conversions. Files with the same bytes become one file."""
    for tree in trees:
        tree.model = tree.work / f"{tree.name}-{bits}"
        tree.run(["-c", CONVERT, str(checkpoint.resolve()), str(tree.model), str(bits)])
    old, new = (tree.model for tree in trees)
    for file in new.glob("*.safetensors"):
        if (old / file.name).exists() and filecmp.cmp(old / file.name, file, shallow=False):
            file.unlink()
            os.link(old / file.name, file)
        else:
            progress(f"{file.name}: the two checkouts wrote different bytes")


@contextmanager
def running(trees: Sequence[Tree], threads: int, context: int, isa: str) -> Iterator[dict[str, Child]]:
    """An engine process for each checkout."""
    with ExitStack() as stack:
        children = {}
        for tree in trees:
            put_out_of_memory(tree.model)
            child = Child("npqwen", tree.model, threads, context, environment=tree.environment(isa))
            stack.callback(child.close)
            children[tree.name] = child
        yield children


def speeds(trees: Sequence[Tree], bits: int, threads: int, isa: str, options: argparse.Namespace) -> None:
    """Measure and print the rows in tokens a second."""
    plan = (options.prefill, options.decode, options.depth, options.batch)
    rows: dict[str, Row] = {}
    for _ in range(options.restarts):
        with running(trees, threads, context_for(*plan), isa) as children:
            for name, tokens, request, warmup in measures(*plan):
                row = rows.setdefault(name, Row(RECIPES[bits].name, isa, threads, name, tokens))
                for child in children.values():
                    child.ask(**warmup)
                for contender, answer in take_turns(children, request, options.repeat):
                    row.seconds[contender].append(answer["seconds"])
                    row.cpu_seconds[contender].append(answer["cpu_seconds"])
                progress(row.text())
    for row in rows.values():
        print(row.text(), flush=True)


def starts(trees: Sequence[Tree], bits: int, options: argparse.Namespace) -> None:
    """Measure and print the seconds of a process from its start, by its end or first token."""
    threads = max(options.threads)
    # Python compiles a checkout's modules in the first, uncounted round.
    timed(trees, "-", 1, "import npqwen", ["-c", "import npqwen"], options.repeat)
    timed(trees, "-", 1, "import npqwen.model", ["-c", "import npqwen.model"], options.repeat)
    timed(trees, "-", 1, "npqwen chat --help", ["-m", "npqwen", "chat", "--help"], options.repeat)
    first = [str(ENGINE), "first", "npqwen", "MODEL", "--threads", str(threads)]
    timed(trees, RECIPES[bits].name, threads, "first token", first, options.repeat)
    timed(trees, RECIPES[bits].name, threads, "first token, kernels to compile", first, COMPILING_ROUNDS, fresh=True)


def timed(
    trees: Sequence[Tree],
    encoding: str,
    threads: int,
    name: str,
    command: Sequence[str],
    rounds: int,
    fresh: bool = False,
) -> None:
    """Time a Python command in both checkouts in turn and print the row.

    command: MODEL in it stands for the converted directory. fresh: with an empty cache of kernels each time.
    """
    row = Row(encoding, "default", threads, name, 0)
    for number in range(0 if fresh else -1, rounds):
        for tree in trees[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as cache:
                own = [str(tree.model) if word == "MODEL" else word for word in command]
                start, cpu = time.perf_counter(), children_cpu()
                tree.run(own, **({"NPQWEN_CACHE": cache} if fresh else {}))
                if number >= 0:
                    row.seconds[tree.name].append(time.perf_counter() - start)
                    row.cpu_seconds[tree.name].append(children_cpu() - cpu)
    progress(row.text())
    print(row.text(), flush=True)


def children_cpu() -> float:
    """CPU seconds of all child processes that have ended; 0 where the platform does not count them."""
    try:
        import resource
    except ImportError:
        return 0.0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="a checkout of npqwen")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face Qwen3 checkpoint directory")
    parser.add_argument("--work", type=Path, help="place for converted models, removed in the end (the system's)")
    parser.add_argument("--bits", type=counts, default=[4])
    parser.add_argument("--isa", type=lambda text: text.split(","), default=["default"], help="such as default,avx2")
    parser.add_argument("--start", action="store_true", help="also time imports, first tokens and compilation")
    add_measure_options(parser)
    options = parser.parse_args(arguments)
    if min([options.repeat, options.restarts, *options.threads]) < 1:
        parser.error("--repeat, --restarts and --threads start at 1")
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work and options.work.resolve()) as work:
        trees = [Tree(name, getattr(options, name).resolve(), Path(work)) for name in ("old", "new")]
        for tree in trees:
            tree.check()
        print(
            f"Model: {options.checkpoint.name}. CPU: {processor()}, {os.cpu_count()} logical cores. "
            f"{platform.system()}, Python {platform.python_version()}. "
            f"Old: {trees[0].commit()}, new: {trees[1].commit()}. Median (range) of "
            f"{options.restarts * options.repeat} rounds in tokens/s.\n\n{HEADER}",
            flush=True,
        )
        for bits in options.bits:
            convert(trees, options.checkpoint, bits)
            for isa in options.isa:
                for threads in options.threads:
                    speeds(trees, bits, threads, isa, options)
            if options.start:
                starts(trees, bits, options)


if __name__ == "__main__":
    main()
