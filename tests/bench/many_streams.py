#!/usr/bin/env python3
"""How much of a pass over many texts reaches them: passes alone, `Batch`, and the server, in turns.

    python tests/bench/many_streams.py MODEL --threads 2 --streams 8 --rounds 5
    NPQWEN_ISA=avx2 python tests/bench/many_streams.py MODEL --threads 2

MODEL is a converted model. In this process: passes of --streams tokens of one sequence, with the logits of all; passes
of one token of each of --streams sequences, or of one; `Batch` with as many texts, or one. Then `npqwen serve` in a
process of its own, asked by HTTP. All begin after prompts of 32 tokens and generate --tokens tokens each, drawn with
temperature 1 and top-k 20, after other prompts in each round: so there is nothing to guess next tokens from.

Prints tokens a second by the median step, which other programs disturb least: medians and ranges over rounds, and the
medians of each round's ratios.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
from completion_stream import OtherTokensError, streams
from server_process import ServerProcess, serve_command

import npqwen
from npqwen.engine.piece import Piece
from npqwen.generation.batch import Batch
from npqwen.generation.sequence import Sequence as Text
from npqwen.hardware.machine import processor
from npqwen.simd.isa import ISA

PROMPT = 32
"""Tokens of each prompt."""
DRAWN: dict[str, Any] = {"temperature": 1, "top_k": 20, "top_p": 1, "min_p": 0}


def prompts(random: Random, count: int) -> list[list[int]]:
    """Random prompts."""
    return [[random.randrange(1000, 4000) for _ in range(PROMPT)] for _ in range(count)]


def rate(count: int, steps: Iterable[Callable[[], object]]) -> float:
    """Tokens a second of steps that each give `count` tokens, by their median time."""
    seconds = []
    for step in steps:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return count / median(seconds)


def raw_rate(model: npqwen.Model, count: int, tokens: int) -> float:
    """Tokens a second of passes of one token of each of `count` sequences, without anything else."""
    caches = [model.new_cache(PROMPT + tokens) for _ in range(count)]
    for ids, cache in zip(prompts(Random(0), count), caches, strict=True):
        model.prefill(np.array(ids, np.int32), cache)
    out = model.new_logits(count)

    def step() -> None:
        model.forward_pieces([Piece(np.array([2000]), cache, 1) for cache in caches], out)

    return rate(count, [step] * tokens)


def pass_rate(model: npqwen.Model, count: int, tokens: int) -> float:
    """Tokens a second of passes of `count` tokens of one sequence, each a token later than the one before."""
    cache = model.new_cache(PROMPT + tokens + count)
    model.prefill(np.array(prompts(Random(0), 1)[0], np.int32), cache)
    ids, out = np.arange(2000, 2000 + count), model.new_logits(count)

    def step() -> None:
        cache.truncate(cache.length - count + 1 if cache.length > PROMPT else PROMPT)
        model.forward_pieces([Piece(ids, cache, count)], out)

    return rate(count, [step] * tokens)


def batch_rate(model: npqwen.Model, count: int, tokens: int, random: Random) -> float:
    """Tokens a second of `Batch`, from the moment that all prompts are computed."""
    batch = Batch(model)
    texts = [
        Text(model, prompt, max_tokens=tokens, seed=random.randrange(1 << 30), **DRAWN)
        for prompt in prompts(random, count)
    ]
    for text in texts:
        batch.add(text, lambda piece: None, lambda error: None)
    while any(text.reads_prompt for text in texts):
        batch.step()
    found = rate(count, [batch.step] * (tokens - max(len(text.decoding.ids) for text in texts)))
    while batch.step():
        pass
    if sum(len(text.decoding.ids) for text in texts) != count * tokens:
        raise OtherTokensError(f"{count} texts should have {tokens} tokens each")
    return found


def served_rate(server: ServerProcess, count: int, tokens: int, random: Random) -> float:
    """Tokens a second of as many streams of the server, while all of them are being written."""
    more = DRAWN | {"seed": random.randrange(1 << 30)}
    found = streams(server.port, [[prompt] for prompt in prompts(random, count)], tokens, more)
    start, end = max(one.times[0] for one in found), min(one.times[-1] for one in found)
    gaps = [
        after - before
        for one in found
        for before, after in zip(one.times, one.times[1:], strict=False)
        if start <= before and after <= end
    ]
    return count / median(gaps)


def completed(measure: Callable[[], float]) -> float:
    """What `measure` returns once no text of it was ended early by the model."""
    for _ in range(20):
        with suppress(OtherTokensError):
            return measure()
    raise SystemExit("the texts of this model end early; measure fewer --tokens")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a converted model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives this
    many, tokens = options.streams, options.tokens
    random = Random(1)
    rates: dict[str, list[float]] = defaultdict(list)
    with npqwen.load(options.model, threads=options.threads) as model, tempfile.TemporaryDirectory() as directory:
        server = ServerProcess(serve_command(options.model, "--threads", str(options.threads)), Path(directory) / "log")
        measures: dict[str, Callable[[], float]] = {
            f"pass of {many} tokens": lambda: pass_rate(model, many, tokens),
            f"pass of {many} sequences": lambda: raw_rate(model, many, tokens),
            f"Batch, {many}": lambda: batch_rate(model, many, tokens, random),
            f"server, {many}": lambda: served_rate(server, many, tokens, random),
            "pass of 1": lambda: raw_rate(model, 1, tokens),
            "Batch, 1": lambda: batch_rate(model, 1, tokens, random),
            "server, 1": lambda: served_rate(server, 1, tokens, random),
        }
        try:
            for number in range(options.rounds + 1):
                for name, measure in list(measures.items())[:: -1 if number % 2 else 1]:
                    rate = completed(measure)
                    if number:  # the first round is a warm-up
                        rates[name].append(rate)
        finally:
            server.kill()
    print(f"{options.model.name}, {processor()}, {ISA.name}, {options.threads} threads\n")
    bases = f"pass of {many} tokens", f"pass of {many} sequences", "Batch, 1"
    print(f"| | tokens/s | {' | '.join(f'/ {base}' for base in bases)} |\n{'|---' * (2 + len(bases))}|")
    for name, found in ((name, rates[name]) for name in measures):
        ratios = [median(a / b for a, b in zip(found, rates[base], strict=True)) for base in bases]
        cells = f"{median(found):.4g} ({min(found):.4g}-{max(found):.4g})", *(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
