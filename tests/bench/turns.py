#!/usr/bin/env python3
"""What the turns of a conversation and the requests of an agent compute again: npqwen serve and llama-server, in turns.

    python tests/bench/make_checkpoint.py 3.5-0.8B build/bench/3.5-0.8B --tokenizer build/bench/tokenizer
    npqwen convert build/bench/3.5-0.8B build/bench/3.5-0.8B-4 --bits 4
    python tests/bench/turns.py build/bench/3.5-0.8B-4 build/bench/3.5-0.8B.gguf LLAMA_SERVER --threads 2

Both get the same prompts, as token ids:

* a conversation of --turns turns whose answers begin with thoughts, which later prompts leave out (as Qwen's templates
  do): each prompt ends with a new question;
* an agent: --agent tokens of system prompt and tools, and behind them another task in every request.

Prints a Markdown table: tokens of prompts, how many of them were computed, and the seconds to the first text.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import median

from completion_stream import Stream, streams
from server_process import ServerProcess, serve_command

from npqwen.hardware.machine import processor
from npqwen.tokenizer import Tokenizer

IDS = 1000, 4000
"""Texts are drawn from these token ids, which are ordinary words."""
SETTLE = 0.5
"""Seconds before each request: OpenMP's idle threads spin for a while."""


class Writer:
    """Messages of random words between Qwen's control tokens."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._random = Random(seed)
        start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
        if start is None or end is None:
            raise SystemExit("the tokenizer has no <|im_start|> and <|im_end|>")
        self._start, self._end = [start], [end]
        self._line = tokenizer.encode("\n")

    def words(self, count: int) -> list[int]:
        return [self._random.randrange(*IDS) for _ in range(count)]

    def opening(self) -> list[int]:
        """How an answer begins."""
        return [*self._start, 1000, *self._line]

    def message(self, count: int) -> list[int]:
        """A message of `count` words."""
        return [*self.opening(), *self.words(count), *self._end, *self._line]


def conversation(writer: Writer, turns: int) -> Iterator[list[int]]:
    """The prompts of a conversation: what the model said is not in them, but an answer of 60 words."""
    history = writer.message(200)
    for _ in range(turns):
        history += writer.message(40)
        yield [*history, *writer.opening()]
        history += writer.message(60)


def agent(writer: Writer, beginning: int, requests: int) -> Iterator[list[int]]:
    """The prompts of an agent."""
    shared = writer.message(beginning)
    for _ in range(requests):
        yield [*shared, *writer.message(50), *writer.opening()]


def table(name: str, found: dict[str, list[Stream]]) -> Iterator[str]:
    """A row for each server."""
    for server, results in found.items():
        later = results[1:]
        computed = [one.prompt_tokens - one.cached for one in later]
        times = [one.first for one in later if one.times]  # noise may have no text at all
        first = f"{results[0].first:.2f}" if results[0].times else ""
        cells = f"{sum(one.prompt_tokens for one in later):,} | {sum(computed):,} | {max(computed):,}"
        yield (
            f"| {name} | {server} | {cells} | {first} | {median(times):.2f} | {max(times):.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a converted model of npqwen")
    parser.add_argument("gguf", type=Path, help="the same checkpoint for llama.cpp")
    parser.add_argument("llama_server", type=Path, help="the program llama-server")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--thoughts", type=int, default=100, help="tokens that each answer has")
    parser.add_argument("--agent", type=int, default=16000, help="tokens that the agent's requests have in common")
    parser.add_argument("--requests", type=int, default=4, help="of the agent")
    parser.add_argument("--launcher", default="", help='a prefix of both servers\' commands, such as "chrt -r 5"')
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives this
    launcher, threads = shlex.split(options.launcher), ["--threads", str(options.threads)]
    context = max(options.agent, options.turns * 120) + 2000
    rival = [str(options.llama_server), "-m", str(options.gguf), *threads, "-np", "1", "-c", str(context)]
    rival += ["--no-webui", "--host", "127.0.0.1"]
    ours = serve_command(options.model, *threads, "--context", str(context))
    tokenizer = Tokenizer.from_directory(options.model)
    print(f"{options.model.name}, {processor()}, {options.threads} threads. The first request is in no sum.\n")
    heads = "tokens of prompts | computed | most in one | first text, s: first | median | longest"
    print(f"| requests | server | {heads} |\n|---|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        servers = {}
        for name, command in (("npqwen", ours), ("llama-server", rival)):
            servers[name] = ServerProcess([*launcher, *command], Path(directory) / name)
            stack.callback(servers[name].kill)
        more = {"npqwen": {}, "llama-server": {"ignore_eos": True}}
        for name, prompts, tokens in (
            ("conversation", conversation(Writer(tokenizer, 1), options.turns), options.thoughts),
            ("agent", agent(Writer(tokenizer, 2), options.agent, options.requests), 32),
        ):
            found: dict[str, list[Stream]] = {server: [] for server in servers}
            for prompt in prompts:
                for server, process in servers.items():
                    time.sleep(SETTLE)
                    found[server] += streams(process.port, [[prompt]], tokens, more[server])
            print("\n".join(table(name, found)), flush=True)


if __name__ == "__main__":
    main()
