#!/usr/bin/env python3
"""How much of a pass over many texts reaches them: raw passes, `Batch`, and the server, in turns.

    python tests/bench/many_streams.py MODEL --threads 2 --streams 8 --rounds 5
    NPQWEN_ISA=avx2 python tests/bench/many_streams.py MODEL --threads 2

MODEL is a converted model. In this process: the rate of raw passes of one token of each of --streams sequences, and of
`Batch` with as many texts, or one. Then `npqwen serve` in a process of its own, asked by HTTP. All begin after prompts
of 32 tokens and generate --tokens tokens each, greedily, or drawn with --sample (temperature 0.7, top-k 20, top-p 0.8).
Prints medians and ranges in tokens a second.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from completion_stream import decode_rate, streams
from server_process import ServerProcess, serve_command

import npqwen
from npqwen.engine.engine import Piece
from npqwen.generation.batch import Batch
from npqwen.generation.sequence import Sequence as Text
from npqwen.hardware.machine import processor
from npqwen.simd.isa import ISA

PROMPT = 32
"""Tokens of each prompt."""
SAMPLED = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "seed": 1}


def prompt(number: int) -> list[int]:
    """The prompt of one text; no two begin alike."""
    return list(range(1000 + 37 * number, 1000 + 37 * number + PROMPT))


def raw_rate(model: npqwen.Model, count: int, tokens: int) -> float:
    """Tokens a second of passes of one token of each of `count` sequences, without anything else."""
    caches = [model.new_cache(PROMPT + tokens) for _ in range(count)]
    for number, cache in enumerate(caches):
        model.prefill(np.array(prompt(number), np.int32), cache)
    out = model.new_logits(count)
    start = time.perf_counter()
    for step in range(tokens):
        for cache in caches:
            cache.reserve(1)
        model.forward_pieces([Piece(np.array([2000 + step]), cache, 1) for cache in caches], out)
    return count * tokens / (time.perf_counter() - start)


def pass_rate(model: npqwen.Model, count: int, passes: int) -> float:
    """Tokens a second of passes of `count` tokens of one sequence, with the logits of all of them."""
    cache = model.new_cache(PROMPT + passes + count)
    model.prefill(np.array(prompt(0), np.int32), cache)
    out = model.new_logits(count)
    start = time.perf_counter()
    for step in range(passes):
        cache.truncate(PROMPT + step)
        cache.reserve(count)
        model.forward_pieces([Piece(np.arange(2000, 2000 + count), cache, count)], out)
    return count * passes / (time.perf_counter() - start)


def batch_rate(model: npqwen.Model, count: int, tokens: int, options: dict[str, Any]) -> float:
    """Tokens a second of `Batch`, from the moment that all prompts are computed."""
    batch = Batch(model)
    texts = []
    for number in range(count):
        text = Text(model, prompt(number), max_tokens=tokens, **options)
        batch.add(text, lambda piece: None, lambda error: None)
        texts.append(text)
    while any(text.reads_prompt for text in texts):
        batch.step()
    before = sum(len(text.decoding.ids) for text in texts)
    start = time.perf_counter()
    while batch.step():
        pass
    after = sum(len(text.decoding.ids) for text in texts)
    if after != count * tokens:
        raise SystemExit(f"{count} texts of {tokens} tokens have {after} together")
    return (after - before) / (time.perf_counter() - start)


def served_rate(server: ServerProcess, count: int, tokens: int, options: dict[str, Any]) -> float:
    """Tokens a second of as many streams of the server."""
    return decode_rate(streams(server.port, [[prompt(number)] for number in range(count)], tokens, options))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a converted model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives this
    many, tokens = options.streams, options.tokens
    sampling: dict[str, Any] = SAMPLED if options.sample else {"temperature": 0}
    rates: dict[str, list[float]] = defaultdict(list)
    with npqwen.load(options.model, threads=options.threads) as model, tempfile.TemporaryDirectory() as directory:
        server = ServerProcess(serve_command(options.model, "--threads", str(options.threads)), Path(directory) / "log")
        measures: dict[str, Callable[[], float]] = {
            "raw passes of 1": lambda: raw_rate(model, 1, tokens),
            f"raw passes of {many}": lambda: raw_rate(model, many, tokens),
            f"passes of {many} tokens of one text": lambda: pass_rate(model, many, tokens),
            "Batch, 1": lambda: batch_rate(model, 1, tokens, sampling),
            f"Batch, {many}": lambda: batch_rate(model, many, tokens, sampling),
            "server, 1": lambda: served_rate(server, 1, tokens, sampling),
            f"server, {many}": lambda: served_rate(server, many, tokens, sampling),
        }
        try:
            for number in range(options.rounds + 1):
                for name, measure in list(measures.items())[:: -1 if number % 2 else 1]:
                    rate = measure()
                    if number:  # the first round is a warm-up
                        rates[name].append(rate)
        finally:
            server.kill()
    whole, alone = median(rates[f"raw passes of {many}"]), median(rates["Batch, 1"])
    print(f"{options.model.name}, {processor()}, {ISA.name}, {options.threads} threads\n")
    print(f"| measure | tokens/s | of raw passes of {many} | times one alone in Batch |\n|---|---|---|---|")
    for name in measures:
        middle, low, high = median(rates[name]), min(rates[name]), max(rates[name])
        print(f"| {name} | {middle:.4g} ({low:.4g}-{high:.4g}) | {middle / whole:.2f} | {middle / alone:.2f} |")


if __name__ == "__main__":
    main()
