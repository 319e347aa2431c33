#!/usr/bin/env python3
"""The time to the first token of a second request with the same long prefix, beside that of the first.

    python tests/bench/make_checkpoint.py 0.6B build/bench/0.6B
    npqwen convert build/bench/0.6B build/bench/0.6B-int4
    chrt -f 5 python tests/bench/prefix_cache.py build/bench/0.6B-int4 --threads 2

MODEL is a converted directory. Every round has a prefix of its own, of random tokens, and a question of 16 tokens
after it. A table has the shares of the first request's time that these take: another question with the prefix in
memory; after the model was loaded again, with its files in the system's page cache, and (where the system can be told)
evicted from it. Medians of all rounds. Below it: how long `close` waits for files, and the tokens per second that
follow the first request while its files are to be written, beside those of a model without a prefix cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from npqwen.generation.stream import Stream
from npqwen.model import Model, load

QUESTION = 16
LIMITS = {"in memory": 0.03, "after a restart": 0.15, "after a restart, not in the page cache": 0.15}


def ask(model: Model, prefix: list[int], seed: int, tokens: int = 1, cached: int = 0) -> tuple[float, float]:
    """Seconds to the first token of a question after the prefix, and tokens per second after it."""
    question = np.random.default_rng(seed).integers(0, model.config.vocab_size, QUESTION).tolist()
    ends = dict.fromkeys(model.generation_config.eos_ids, -np.inf)
    stream = Stream(model, prefix + question, max_tokens=tokens, temperature=0, logit_bias=ends)
    usage = stream.completion().usage
    assert usage.cached_tokens == cached, f"{usage.cached_tokens} tokens were cached, not {cached}"
    return usage.first_token_seconds, usage.decode_rate


def evict(directory: Path) -> None:
    """Have the system forget the contents of the files."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prefix", type=int, default=4096, help="tokens, a multiple of 256; default: 4096")
    parser.add_argument("--decode", type=int, default=64, help="tokens of the first answer; default: 64")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    first: list[float] = []
    shares: dict[str, list[float]] = {name: [] for name in LIMITS if hasattr(os, "posix_fadvise") or "page" not in name}
    closing: list[float] = []
    rates: dict[str, list[float]] = {"while files are to be written": [], "without": []}
    for seed in range(options.rounds):
        with tempfile.TemporaryDirectory() as place:

            def opened(place: str | None = place) -> Model:
                return load(options.model, threads=options.threads, prefix_cache=place)

            with opened(None) as model:
                prefix = np.random.default_rng(seed).integers(0, model.config.vocab_size, options.prefix).tolist()
                rates["without"].append(ask(model, prefix, 1, options.decode)[1])
            model = opened()
            seconds, rate = ask(model, prefix, 1, options.decode)
            first.append(seconds)
            rates["while files are to be written"].append(rate)
            shares["in memory"].append(ask(model, prefix, 2, cached=len(prefix))[0] / seconds)
            start = time.perf_counter()
            model.close()
            closing.append(time.perf_counter() - start)
            for name in list(shares)[1:]:
                if "page" in name:
                    evict(Path(place))
                with opened() as model:
                    shares[name].append(ask(model, prefix, 3, cached=len(prefix))[0] / seconds)
    print(f"prefix of {options.prefix} tokens, first request: {median(first):.2f} s\n")
    print("| second request | share of the first | limit |\n|---|---|---|")
    for name, found in shares.items():
        print(f"| {name} | {median(found):.2%} | {LIMITS[name]:.0%} |")
    print(f"\nclose: {median(closing):.2f} s")
    for name, found in rates.items():
        print(f"tokens per second {name}: {median(found):.1f}")


if __name__ == "__main__":
    main()
