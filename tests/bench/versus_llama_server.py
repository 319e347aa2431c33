#!/usr/bin/env python3
"""Compare `npqwen serve` with llama.cpp's llama-server: many streams at once, on one checkpoint, in turns.

    python tests/bench/wide_tokenizer.py build/bench/tokenizer
    python tests/bench/make_checkpoint.py 0.6B build/bench/0.6B --tokenizer build/bench/tokenizer
    npqwen convert build/bench/0.6B build/bench/0.6B-4 --bits 4
    python tests/bench/gguf_from_checkpoint.py build/bench/0.6B build/bench/0.6B.gguf --type q4_0
    python tests/bench/versus_llama_server.py build/bench/0.6B-4 build/bench/0.6B.gguf LLAMA_SERVER --threads 2

Both servers are loaded, and one sleeps while the other is measured. They get the same prompts, as token ids, and must
count the same tokens; no prompt begins like another, and llama-server keeps none. Every round measures

* one stream, and --slots streams at once, after short prompts: tokens a second;
* a mix of --slots clients with prompts of 64 to 2,048 tokens, each sending the next one when its answer is complete:
  seconds to the first text, gaps between pieces of text, tokens a second from the first request to the last text.

Prints a Markdown table: medians over rounds; times to the first text and gaps are taken from all rounds together.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
from completion_stream import Stream, decode_rate, streams
from server_process import ServerProcess, serve_command

from npqwen.hardware.machine import processor

LENGTHS = (64, 128, 256, 512, 1024, 2048)
CONTEXT = 4096
"""Tokens of each of llama-server's slots."""
IDS = 1000, 4000
"""Prompts are drawn from these token ids, which are ordinary words."""
SETTLE = 0.5
"""Seconds before each measurement: OpenMP's idle threads spin for a while."""

Measured = dict[str, list[float]]


class Contender:
    """A server and what its requests have beside the common fields."""

    def __init__(self, name: str, server: ServerProcess, more: Mapping[str, Any]) -> None:
        self.name = name
        self.server = server
        self.more = more

    def run(self, prompts: Sequence[Sequence[Sequence[int]]], tokens: int) -> list[Stream]:
        """The streams of clients that send these prompts."""
        time.sleep(SETTLE)
        return streams(self.server.port, prompts, tokens, self.more)


def words(random: Random, count: int) -> list[int]:
    """A prompt of `count` random token ids."""
    return [random.randrange(*IDS) for _ in range(count)]


def measure_streams(contender: Contender, random: Random, count: int, tokens: int) -> Measured:
    """Tokens a second of `count` streams at once, all together."""
    found = contender.run([[words(random, 32)] for _ in range(count)], tokens)
    return {f"{count} stream{'s' if count > 1 else ''}, tokens/s": [decode_rate(found)]}


def measure_mix(contender: Contender, random: Random, clients: int, each: int, tokens: int) -> Measured:
    """First texts, gaps and rate of clients whose prompts are of all lengths."""
    lengths = [LENGTHS[at % len(LENGTHS)] for at in range(clients * each)]
    random.shuffle(lengths)
    prompts = [[words(random, length) for length in lengths[at::clients]] for at in range(clients)]
    found = contender.run(prompts, tokens)
    seconds = max(one.times[-1] for one in found) - min(one.sent for one in found)
    total = sum(one.tokens for one in found)
    return {
        "first": [one.first for one in found],
        "gaps": [gap for one in found for gap in one.gaps],
        "mix: generated tokens/s": [total / seconds],
        "mix: all tokens/s": [(total + sum(lengths)) / seconds],
    }


SUMMARIES: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "mix: first text, median, ms": ("first", lambda seconds: 1e3 * float(np.median(seconds))),
    "mix: first text, 95%, ms": ("first", lambda seconds: 1e3 * float(np.quantile(seconds, 0.95))),
    "mix: gap, median, ms": ("gaps", lambda seconds: 1e3 * float(np.median(seconds))),
    "mix: gap, 99%, ms": ("gaps", lambda seconds: 1e3 * float(np.quantile(seconds, 0.99))),
    "mix: gap, longest, ms": ("gaps", lambda seconds: 1e3 * max(seconds)),
}
"""Rows of the table that are made of all rounds' values."""


def run(contenders: Sequence[Contender], options: argparse.Namespace) -> dict[str, Measured]:
    """What was measured in all rounds, by contender."""
    results: dict[str, Measured] = {one.name: defaultdict(list) for one in contenders}
    for one in contenders:  # a warm-up
        one.run([[words(Random(-1 - at), 600)] for at in range(options.slots)], 8)
    for number in range(options.rounds):
        measures: list[Callable[[Contender, Random], Measured]] = [
            lambda one, random: measure_streams(one, random, 1, options.tokens),
            lambda one, random: measure_streams(one, random, options.slots, options.tokens),
            lambda one, random: measure_mix(one, random, options.slots, options.each, options.tokens),
        ]
        for at, measure in enumerate(measures):
            for one in contenders[:: -1 if number % 2 else 1]:
                for name, values in measure(one, Random(1000 * number + at)).items():
                    results[one.name][name] += values
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return results


def table(results: Mapping[str, Measured]) -> list[str]:
    """The rows of the report. The ratio is above 1 where the first contender is better."""
    names = list(results)
    lines = [f"| measure | {' | '.join(names)} | ratio |", "|---" * (len(names) + 2) + "|"]
    measured = results[names[0]]
    rates = [name for name in measured if "tokens/s" in name]
    cells = [(row, [median(results[name][row]) for name in names]) for row in rates]
    cells += [(row, [make(results[name][key]) for name in names]) for row, (key, make) in SUMMARIES.items()]
    for row, values in cells:
        ratio = values[0] / values[-1] if "tokens/s" in row else values[-1] / values[0]
        lines.append(f"| {row} | {' | '.join(f'{value:.4g}' for value in values)} | {ratio:.2f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a converted model of npqwen")
    parser.add_argument("gguf", type=Path, help="the same checkpoint for llama.cpp")
    parser.add_argument("llama_server", type=Path, help="the program llama-server")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="that each request generates")
    parser.add_argument("--each", type=int, default=3, help="requests of each client of the mix")
    parser.add_argument("--launcher", default="", help='a prefix of both servers\' commands, such as "chrt -r 5"')
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives this
    launcher = shlex.split(options.launcher)
    threads = ["--threads", str(options.threads)]
    rival = [str(options.llama_server), "-m", str(options.gguf), *threads, "-np", str(options.slots)]
    rival += ["-c", str(CONTEXT * options.slots), "--no-webui", "--host", "127.0.0.1"]
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        servers = []
        for name, command in (("npqwen", serve_command(options.model, *threads)), ("llama-server", rival)):
            server = ServerProcess([*launcher, *command], Path(directory) / name)
            stack.callback(server.kill)
            servers.append(server)
        contenders = [
            Contender("npqwen", servers[0], {}),
            Contender("llama-server", servers[1], {"ignore_eos": True, "cache_prompt": False}),
        ]
        results = run(contenders, options)
    print(f"{options.model.name}, {processor()}, {options.threads} threads, {platform.system()}. ", end="")
    print(f"{options.rounds} rounds, {options.slots} clients, {options.tokens} generated tokens a request.\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
