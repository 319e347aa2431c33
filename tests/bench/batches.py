#!/usr/bin/env python3
"""Many requests: one by one, together by `model.generate(list)`, and by `npqwen batch`; in turns.

    python tests/bench/batches.py build/bench/0.6B-4 --threads 2

Requests have prompts of mixed lengths (log-uniform, 16 to 512 tokens) of random tokens, drawn anew for each run, so
that no run finds another's prefixes; every answer has --tokens tokens, drawn with temperature 1 and top-k 20. `npqwen
batch` is the command, in a process of its own: its seconds are those that it reports, the loading of the model among
them.
Prints generated tokens a second: medians and ranges of the rounds, and how many times as fast as one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from interleave import progress, speed_cell

import npqwen

SHORTEST, LONGEST = 16, 512
TOP_K = 20


def lengths(count: int) -> list[int]:
    """Of the prompts, in the order of the requests: the same in every run."""
    logarithms = np.random.default_rng(0).uniform(np.log(SHORTEST), np.log(LONGEST), count)
    return [round(float(value)) for value in np.exp(logarithms)]


def prompts(model: npqwen.Model, count: int, run: int) -> list[list[int]]:
    """Random tokens, others in each run."""
    rng = np.random.default_rng([1, run])
    few = min(model.config.vocab_size, len(model.tokenizer)) - 10  # control tokens are the last ones
    return [rng.integers(0, few, length).tolist() for length in lengths(count)]


def batch_command(directory: Path, asked: list[list[int]], options: dict[str, Any], arguments: list[str]) -> float:
    """Seconds that `npqwen batch` reports for these prompts."""
    with tempfile.TemporaryDirectory() as place:
        requests, answers = Path(place) / "requests.jsonl", Path(place) / "answers.jsonl"
        with requests.open("w", encoding="utf-8") as file:
            for i, prompt in enumerate(asked):
                body = {"model": "", "prompt": prompt, **options}
                line = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        named = [str(requests), str(answers), "--model", str(directory)]
        command = [sys.executable, "-m", "npqwen", "batch", *named, *arguments]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        found = re.search(r"(\d+) answered in ([\d.]+) s; ", done.stderr)
        if done.returncode or found is None or int(found[1]) != len(asked):
            raise SystemExit(f"npqwen batch failed: {done.stderr}")
        return float(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a converted model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--count", type=int, default=32, help="requests")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    with npqwen.load(options.model, threads=options.threads) as model:
        never = dict.fromkeys(model.generation_config.eos_ids, -100.0)
        sampling: dict[str, Any] = {"max_tokens": options.tokens, "temperature": 1.0, "top_k": TOP_K}
        flags = ["--threads", str(options.threads)]

        def one_by_one(asked: list[list[int]]) -> float:
            start = time.perf_counter()
            texts = [model.generate(prompt, seed=0, logit_bias=never, **sampling) for prompt in asked]
            seconds = time.perf_counter() - start
            assert all(len(text.ids) == options.tokens for text in texts)
            return seconds

        def together(asked: list[list[int]]) -> float:
            start = time.perf_counter()
            texts = model.generate(asked, seed=0, logit_bias=never, **sampling)
            seconds = time.perf_counter() - start
            assert all(len(text.ids) == options.tokens for text in texts)
            return seconds

        def command(asked: list[list[int]]) -> float:
            named = {str(id): bias for id, bias in never.items()}
            return batch_command(options.model, asked, {**sampling, "seed": 0, "logit_bias": named}, flags)

        ways: dict[str, Callable[[list[list[int]]], float]] = {
            "one by one": one_by_one,
            "`model.generate(list)`": together,
            "`npqwen batch`": command,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        together(prompts(model, min(4, options.count), 0))  # reads the weights
        run = 0
        for number in range(options.rounds):
            for name in list(ways)[:: -1 if number % 2 else 1]:
                run += 1
                seconds[name].append(ways[name](prompts(model, options.count, run)))
                progress(f"round {number + 1}, {name}: {seconds[name][-1]:.1f} s")
    tokens = options.count * options.tokens
    total = sum(lengths(options.count))
    print(f"\n{options.count} requests, {total} tokens of prompts, {options.tokens} generated for each, "
          f"{options.threads} threads\n")  # fmt: skip
    print("| | generated tokens/s | times one by one |\n|---|---|---|")
    for name, found in seconds.items():
        ratios = [alone / own for alone, own in zip(seconds["one by one"], found, strict=True)]
        print(f"| {name} | {speed_cell(tokens, found)} | {median(ratios):.2f} |")


if __name__ == "__main__":
    main()
