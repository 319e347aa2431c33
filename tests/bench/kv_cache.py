#!/usr/bin/env python3
"""Speed of decoding after long texts with each type of KV cache, in turns, and of reading a long prompt.

    python tests/bench/kv_cache.py CONVERTED [--threads 1,2] [--depth 4096,16384] [--kv f16,int8] [--prefill]

The caches are filled with random bytes of plausible keys and values; only those of hybrids, which have states, too, are
computed.
Prints medians, and the median of the rounds' ratios to the first type; beside it what the bytes that each token reads,
weights and cache, would give at equal bandwidth.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np

from npqwen.engine.cache_type import CacheType
from npqwen.engine.kv_cache import KVCache
from npqwen.kernels.int8_page import SCALES_BYTES
from npqwen.model import Model, load

STEPS = 8
"""Tokens of a measurement."""


def fill(cache: KVCache, tokens: int) -> None:
    """Make the cache hold this many tokens of random keys and values."""
    rng = np.random.default_rng(0)
    cache.reserve(tokens)
    for page in cache.pages(tokens):
        if cache.kv == "int8":
            page[:] = rng.integers(0, 256, page.shape, np.uint8)
            page[..., :SCALES_BYTES].view(np.float32)[:] = 0.02
        else:
            numbers = rng.standard_normal(page.shape, np.float32)
            page[:] = numbers.astype(np.float16).view(np.uint16) if cache.kv == "f16" else numbers
    cache.length = tokens


def seconds_per_token(model: Model, cache: KVCache) -> float:
    """Of decoding STEPS tokens, which are discarded afterwards."""
    length = cache.length
    model.forward([5], cache)
    start = time.perf_counter()
    for i in range(STEPS):
        model.forward([7 + i], cache)
    taken = (time.perf_counter() - start) / STEPS
    cache.truncate(length)
    return taken


def decode(models: dict[CacheType, Model], depth: int, rounds: int) -> None:
    caches = {kv: model.new_cache(depth + STEPS + 1) for kv, model in models.items()}
    for kv, cache in caches.items():
        if models[kv].config.recurrence is None:
            fill(cache, depth)
        else:
            models[kv].prefill(np.random.default_rng(0).integers(1000, 100_000, depth), cache)
    taken: dict[CacheType, list[float]] = {kv: [] for kv in models}
    for _ in range(rounds):
        for kv, model in models.items():
            taken[kv].append(seconds_per_token(model, caches[kv]))
    first = next(iter(models))
    read = {kv: model.weight_bytes + caches[kv].nbytes for kv, model in models.items()}
    for kv, model in models.items():
        ratio = median(a / b for a, b in zip(taken[first], taken[kv], strict=True))
        rates = f"{1 / median(taken[kv]):6.1f} ({1 / max(taken[kv]):.1f} to {1 / min(taken[kv]):.1f})"
        print(
            f"| decode | {depth} | {model.threads} | {kv} | {rates} | {ratio:.2f} | {read[first] / read[kv]:.2f} |",
            flush=True,
        )


def prefill(models: dict[CacheType, Model], tokens: int, rounds: int) -> None:
    ids = np.random.default_rng(0).integers(1000, 100_000, tokens)
    taken: dict[CacheType, list[float]] = {kv: [] for kv in models}
    for _ in range(rounds):
        for kv, model in models.items():
            start = time.perf_counter()
            model.prefill(ids, model.new_cache(tokens))
            taken[kv].append(time.perf_counter() - start)
    first = next(iter(models))
    for kv, model in models.items():
        ratio = median(a / b for a, b in zip(taken[first], taken[kv], strict=True))
        rates = f"{tokens / median(taken[kv]):6.1f} ({tokens / max(taken[kv]):.1f} to {tokens / min(taken[kv]):.1f})"
        print(f"| prefill | {tokens} | {model.threads} | {kv} | {rates} | {ratio:.2f} | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--depth", default="4096,16384")
    parser.add_argument("--kv", default="f16,int8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prefill", action="store_true")
    options = parser.parse_args()
    kinds = [kv for kv in get_args(CacheType) if kv in options.kv.split(",")]
    kinds.sort(key=options.kv.split(",").index)
    print("| | tokens | threads | cache | tokens/s | ratio | by bytes |\n|---|---:|---:|---|---|---:|---:|")
    for threads in map(int, options.threads.split(",")):
        models = {kv: load(options.model, threads=threads, kv=kv) for kv in kinds}
        for depth in map(int, options.depth.split(",")):
            decode(models, depth, options.rounds)
            if options.prefill:
                prefill(models, depth, max(1, options.rounds // 5))
        for model in models.values():
            model.close()


if __name__ == "__main__":
    main()
