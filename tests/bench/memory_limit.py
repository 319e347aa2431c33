#!/usr/bin/env python3
"""Run npqwen within a memory limit: does it work, how fast, and how much memory does it use?

    python tests/bench/memory_limit.py --limit 4 build/0.6B-int4 build/1.7B-int4 build/4B-int4
    python tests/bench/memory_limit.py --limit 8 build/8B-int4
    python tests/bench/memory_limit.py --limit 4 --convert build/8B build/8B-int4

Each model is loaded, a prompt run and tokens decoded in a separate process, in a memory control group (version 1 or 2)
below this process's, which counts mapped weights too; where none can be created, under a limit on the address space
(RLIMIT_AS), which is stricter. The model's files are evicted from the page cache first, so that the group is charged
for them; kernels are compiled, unless --cache names a directory. All weights are read once before the prompt: what
prefill and decoding read from the disk was evicted meanwhile. Prints a Markdown table. Linux only.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from npqwen.hardware import cgroup
from npqwen.hardware.machine import processor

POLL_SECONDS = 0.02
HEADER = (
    "| run | limit, GB | prefill, tok/s | decode, tok/s | read again, GB | peak anonymous, GB "
    "| peak with mapped files, GB | peak of the group, GB | seconds in all |\n|---|---|---|---|---|---|---|---|---|"
)


@dataclass
class Run:
    """Outcome of a process: memory in bytes, seconds, exit status and output."""

    own: int
    """Peak anonymous memory."""
    resident: int
    """Peak resident memory, mapped files included."""
    group: int | None
    """Peak of its control group, which includes the page cache of files that it reads."""
    seconds: float
    status: int
    out: str


@contextmanager
def limited(limit: int) -> Iterator[Path | None]:
    """A control group of `limit` bytes below this process's; None if none can be created."""
    for version, file in ((1, "memory.limit_in_bytes"), (2, "memory.max")):
        own = next(cgroup.groups("memory" if version == 1 else None), None)
        if own is None:
            continue
        path = own / f"npqwen-limit-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            try:
                (path / file).write_text(str(limit))
            except OSError:  # the memory controller is not of this version, or not delegated
                continue
            yield path
            return
        finally:
            _remove(path)
    yield None


def _remove(path: Path) -> None:
    """Remove a group, waiting for its processes to exit."""
    for _ in range(100):
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"{path} is still in use; remove it by hand")


def watch(command: Sequence[str], limit: int, group: Path | None, environment: dict[str, str]) -> Run:
    """Run a command under the limit and poll its memory."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    own = resident = 0
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, env=environment, preexec_fn=enter)
        try:
            while process.poll() is None:
                for line in (cgroup.read(Path(f"/proc/{process.pid}/status")) or "").splitlines():
                    if line.startswith("RssAnon:"):
                        own = max(own, 1024 * int(line.split()[1]))
                    elif line.startswith("VmHWM:"):
                        resident = max(resident, 1024 * int(line.split()[1]))
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        seconds = time.perf_counter() - start
        return Run(own, resident, _peak(group), seconds, process.returncode, out.read())


def _peak(group: Path | None) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        text = None if group is None else cgroup.read(group / name)
        if text is not None:
            return int(text)
    return None


def drop(directory: Path) -> None:
    """Evict a directory's files from the page cache, so that the next reader is charged for them."""
    for path in directory.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: Path, prompt: int, tokens: int, threads: int | None) -> None:
    """In the child process: print tokens per second, and bytes read from the disk meanwhile, as JSON."""
    import numpy as np

    import npqwen.model

    loaded = npqwen.model.load(model, threads=threads)
    ids = np.random.default_rng(0).integers(0, len(loaded.tokenizer), prompt + tokens)
    cache = loaded.new_cache(prompt + tokens)
    for tensor in loaded.weights.tensors.values():  # the prompt reads no more of a mixture than the chosen experts
        tensor.data[:: mmap.PAGESIZE].max()
    loaded.prefill(ids[:32], cache)
    cache.truncate(0)
    before = bytes_read()
    times = [time.perf_counter()]
    loaded.prefill(ids[:prompt], cache)
    times.append(time.perf_counter())
    for i in range(prompt, prompt + tokens):
        loaded.forward(ids[i : i + 1], cache)
    times.append(time.perf_counter())
    again = bytes_read() - before
    loaded.close()
    speeds = {"prefill": prompt / (times[1] - times[0]), "decode": tokens / (times[2] - times[1])}
    print(json.dumps(speeds | {"again": again}))


def bytes_read() -> int:
    """What this process has read from the disk so far: by page faults, read-ahead and prefetching, too."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def row(name: str, limit: int, group: Path | None, run: Run) -> str:
    """A row of the Markdown table."""
    speeds = ["", "", ""]
    if run.status:
        name += f": killed by signal {-run.status}" if run.status < 0 else f": failed with status {run.status}"
    elif run.out.startswith("{"):
        found = json.loads(run.out)
        speeds = [f"{found['prefill']:.1f}", f"{found['decode']:.2f}", f"{found['again'] / 1e9:.2f}"]
    most = "unknown" if run.group is None else f"{run.group / 1e9:.2f}"
    under = f"{limit / 1e9:.2f}" + (" (address space)" if group is None else "")
    return (
        f"| {name} | {under} | {' | '.join(speeds)} | {run.own / 1e9:.2f} | {run.resident / 1e9:.2f} "
        f"| {most} | {run.seconds:.0f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", help="converted directories")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB; default 4")
    parser.add_argument(
        "--convert", type=Path, nargs=2, metavar=("CHECKPOINT", "OUT"), help="also convert to int4 within the limit"
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded after it")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache", type=Path, help="cache of compiled kernels (an empty one for each model)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("this needs Linux: control groups, or limits on the address space")
    if options.child:
        measure(options.models[0], options.prompt, options.tokens, options.threads)
        return
    limit = int(options.limit * (1 << 30))
    print(f"{processor()}, {os.cpu_count()} processors.\n\n{HEADER}", flush=True)
    own = [sys.executable, __file__, "--child", "--prompt", str(options.prompt), "--tokens", str(options.tokens)]
    own += ["--threads", str(options.threads)] if options.threads else []
    jobs = [(model.name, model, [*own, str(model)]) for model in options.models]
    if options.convert:
        source, out = options.convert
        command = [sys.executable, "-m", "npqwen", "convert", str(source), str(out), "--quiet"]
        jobs.insert(0, (f"convert {source.name}", source, command))
    for name, directory, command in jobs:
        drop(directory)
        with tempfile.TemporaryDirectory() as fresh, limited(limit) as group:
            environment = {**os.environ, "NPQWEN_CACHE": str(options.cache or fresh)}
            print(row(name, limit, group, watch(command, limit, group, environment)), flush=True)


if __name__ == "__main__":
    main()
