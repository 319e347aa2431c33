#!/usr/bin/env python3
"""Speed of a mixture of experts that is larger than memory: npqwen and llama.cpp, both with mapped files.

    python tests/bench/page_cache.py CONVERTED Q4_0.gguf --shares 100,75,50 --threads 2

For each share both engines run in separate processes, each in a memory control group with room for that share of the
experts' bytes (the other weights must fit in there too) and for the process's anonymous memory, which a first run
without a limit measures. The files are evicted from the page cache, `--warm` tokens are decoded one by one, then the
engines take turns at `--tokens` tokens each. Prints a Markdown table: medians and ranges in tokens per second, and the
bytes read from disk per token.

Weights of `make_checkpoint.py` are random and all experts equally likely, the worst case for a cache. Real routers
prefer some experts.

Needs Linux, the right to create control groups (root), and `pip install npqwen[bench]`. llama.cpp runs without its
repacked copies of the weights, which would not fit.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from interleave import SETTLE_SECONDS, Child, counts, progress

from npqwen.engine.weights import Weights
from npqwen.format.config import Config
from npqwen.hardware.machine import processor

# Page tables and allocators' reserves, which vary.
SLACK = 32 << 20


class Group:
    """A new memory control group, of version 1 or 2."""

    def __init__(self, root: Path, name: str, limit: int | None) -> None:
        """limit: bytes of memory and page cache together."""
        self.path = root / f"npqwen-bench-{os.getpid()}-{name}"
        self._first = (root / "memory.limit_in_bytes").exists()
        try:
            self.path.mkdir()
            if limit is not None:
                file = self.path / ("memory.limit_in_bytes" if self._first else "memory.max")
                file.write_text(str(limit // 4096 * 4096))
        except OSError as error:
            raise SystemExit(
                f"{self.path} cannot be created ({error.strerror}); this needs root and, with control groups of "
                "version 2, `memory` in its parent's cgroup.subtree_control"
            ) from None

    def holds(self, kind: str) -> int:
        """Bytes of memory in the group. kind: "anonymous" or (page) "cache"."""
        names = {"anonymous": ("rss", "anon"), "cache": ("cache", "file")}[kind]
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(stat[names[0 if self._first else 1]])

    def launcher(self) -> list[str]:
        """A command prefix that starts a command in this group."""
        return ["sh", "-c", f'echo $$ > {self.path / "cgroup.procs"} && exec "$@"', "sh"]

    def close(self) -> None:
        """Remove the group when its processes have ended."""
        for _ in range(100):
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.1)


@dataclass
class Contender:
    """One engine under one limit, and its measurements."""

    child: Child
    group: Group
    seconds: list[float] = field(default_factory=list)
    read: int = 0
    cached: int = 0

    def read_bytes(self) -> int:
        """Bytes that the process has read from disk since it started."""
        lines = Path(f"/proc/{self.child.pid}/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def drop(path: Path) -> None:
    """Evict a file, or a directory's files, from the page cache."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def contenders(limits: dict[str, int | None], options: argparse.Namespace) -> Iterator[dict[str, Contender]]:
    """A running engine of each kind, each in its own group."""
    models = {"npqwen": options.model, "llama": options.gguf}
    with ExitStack() as stack:
        running = {}
        for kind, model in models.items():
            drop(model)
            group = Group(options.groups, kind, limits[kind])
            stack.callback(group.close)
            context = options.warm + options.repeat * options.tokens
            child = Child(kind, model, options.threads, max(context, 512), mapped=True, launcher=group.launcher())
            stack.callback(child.close)
            running[kind] = Contender(child, group)
        yield running


def measure(share: int | None, limits: dict[str, int | None], options: argparse.Namespace) -> dict[str, int]:
    """Print one row. Returns each engine's anonymous memory in bytes."""
    with contenders(limits, options) as running:
        for contender in running.values():
            contender.child.ask(measure="decode", tokens=options.warm, depth=0)
        for turn in range(options.repeat):
            for contender in list(running.values())[:: -1 if turn % 2 else 1]:
                time.sleep(SETTLE_SECONDS)
                before = contender.read_bytes()
                # Every round continues the sequence: new tokens, new experts.
                answer = contender.child.ask(
                    measure="decode", tokens=options.tokens, depth=options.warm + turn * options.tokens
                )
                contender.seconds.append(answer["seconds"])
                contender.read += contender.read_bytes() - before
        anonymous = {kind: contender.group.holds("anonymous") for kind, contender in running.items()}
        for contender in running.values():
            contender.cached = contender.group.holds("cache")
    print(row(share, running, options), flush=True)
    return anonymous


def row(share: int | None, running: dict[str, Contender], options: argparse.Namespace) -> str:
    """A Markdown table row."""
    cells = ["no limit" if share is None else f"{share} %"]
    for contender in running.values():
        speeds = [options.tokens / seconds for seconds in contender.seconds]
        cells.append(f"{median(speeds):.3g} ({min(speeds):.3g}-{max(speeds):.3g})")
    ratio = median(running["llama"].seconds) / median(running["npqwen"].seconds)
    cells.append(f"{ratio:.2f}")
    tokens = options.repeat * options.tokens
    cells.append(" / ".join(f"{contender.read / tokens / 1e6:.0f}" for contender in running.values()))
    cells.append(" / ".join(f"{contender.cached / 1e9:.2f}" for contender in running.values()))
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a converted mixture of experts")
    parser.add_argument("gguf", type=Path, help="the same checkpoint for llama.cpp")
    parser.add_argument(
        "--shares", type=counts, default=[100, 75, 50], help="page cache in percent of the experts' bytes"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--warm", type=int, default=96, help="tokens decoded before the measured ones")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of one measurement")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--groups", type=Path, help="parent directory of the control groups (in /sys/fs/cgroup)")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("this needs Linux")
    if options.groups is None:
        first = Path("/sys/fs/cgroup/memory")
        options.groups = first if first.is_dir() else Path("/sys/fs/cgroup")
    tensors = Weights(options.model, Config.from_directory(options.model)).tensors
    experts = sum(tensor.data.size for name, tensor in tensors.items() if name.endswith("experts.weight"))
    if not experts:
        parser.error(f"{options.model} is not a mixture of experts")
    rest = sum(tensor.data.size for tensor in tensors.values()) - experts
    del tensors
    print(
        f"{options.model.name}: {experts / 1e9:.2f} GB of experts, {rest / 1e9:.2f} GB of other weights. "
        f"{processor()}, {options.threads} threads. Decoding one by one, median (range) of {options.repeat} rounds of "
        f"{options.tokens} tokens, after {options.warm} tokens; tokens/s, llama.cpp with mmap.\n\n"
        "| page cache, of the experts | npqwen | llama.cpp | ratio | MB read per token | GB cached at the end |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    anonymous = measure(None, {"npqwen": None, "llama": None}, options)
    progress(", ".join(f"{kind}: {size / 1e6:.0f} MB anonymous" for kind, size in anonymous.items()))
    for share in options.shares:
        limits = {kind: size + SLACK + experts * share // 100 for kind, size in anonymous.items()}
        measure(share, dict(limits), options)


if __name__ == "__main__":
    main()
