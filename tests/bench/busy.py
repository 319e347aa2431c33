"""Decoding beside another busy program: npqwen with one thread and with one per CPU, and llama.cpp.

    python tests/bench/busy.py MODEL [--gguf FILE] [--rounds 15] [--pinned] [--prefill 512]

MODEL is a converted directory. In every round each contender is measured alone and beside a process that does nothing
but compute, at the same priority; --pinned keeps that process on the last CPU. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from interleave import Child, take_turns

SPIN = "while True: pass"
SETTLE_SECONDS = 0.3
"""Time for the system to spread processes over the CPUs."""


@contextmanager
def busy_program(pinned: bool) -> Iterator[None]:
    """Another program that keeps one CPU busy."""
    other = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        if pinned:
            os.sched_setaffinity(other.pid, {max(os.sched_getaffinity(0))})
        time.sleep(SETTLE_SECONDS)
        yield
    finally:
        other.kill()
        other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64, help="to decode in a round")
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prompt to measure instead of decoding")
    parser.add_argument("--pinned", action="store_true", help="keep the busy process on the last CPU")
    options = parser.parse_args()
    cpus = os.cpu_count() or 1
    engines = [("npqwen", options.model), *([("llama", options.gguf)] if options.gguf else [])]
    tokens = options.prefill or options.tokens
    request: dict[str, Any] = {"measure": "prefill" if options.prefill else "decode", "tokens": tokens}
    if not options.prefill:
        request["depth"] = 0
    with ExitStack() as stack:
        children = {}
        for kind, model in engines:
            for threads in sorted({1, cpus}):
                child = Child(kind, model, threads, max(512, 2 * tokens))
                stack.callback(child.close)
                child.ask(**request)
                children[f"{kind}, {threads} thread{'s' if threads > 1 else ''}"] = child
        rates: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in children}
        for _ in range(options.rounds):
            for name, answer in take_turns(children, request, 1):
                rates[name][False].append(tokens / answer["seconds"])
            with busy_program(options.pinned):
                for name, answer in take_turns(children, request, 1):
                    rates[name][True].append(tokens / answer["seconds"])
    print("| tokens/s | alone | beside a busy process | of one thread |\n|---|---:|---:|---:|")
    for name, found in rates.items():
        first = rates[name.split(",")[0] + ", 1 thread"][True]
        ratio = median(b / a for a, b in zip(first, found[True], strict=True))
        low, high = min(found[True]), max(found[True])
        alone, beside = median(found[False]), f"{median(found[True]):.1f} ({low:.1f}-{high:.1f})"
        print(f"| {name} | {alone:.1f} | {beside} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
