#!/usr/bin/env python3
"""How many passages a second become vectors: npqwen and llama.cpp's embedding mode, in one interleaved run.

    python tests/bench/passages.py MODEL MODEL.gguf --threads 2 --tokens 256 --count 8 --rounds 7

MODEL is a converted model, and MODEL.gguf the same checkpoint with about as many bits, for example by
gguf_from_checkpoint.py. Each contender is a process of its own that sleeps while another one is measured. llama.cpp
(llama-cpp-python) pools the last token, runs flash attention on and off and physical batches (n_ubatch) of 256 and 512
tokens; the fastest of these is its result. Passages are random tokens, all of one length; with --shared, their first
tokens are the same, as a reranker's are.

Prints a Markdown table: medians and ranges over rounds, in passages a second, and the median of each round's ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from interleave import SETTLE_SECONDS

LLAMA = [(flash, ubatch) for flash in ("on", "off") for ubatch in (256, 512)]
Passages = list[Any]


class Npqwen:
    """npqwen, as `Model.embed` calls it."""

    def __init__(self, path: str, threads: int, tokens: int, count: int) -> None:
        from npqwen.model import load

        self._model = load(Path(path), threads=threads, prefix_memory=0)

    def read(self, passages: Passages) -> None:
        from npqwen.retrieval.reader import Reader

        Reader(self._model).read(passages)


class Llama:
    """llama.cpp, with all passages in one call: its own server fills its batches so."""

    def __init__(self, path: str, threads: int, tokens: int, count: int, flash: str, ubatch: int) -> None:
        import llama_cpp

        self._c = llama_cpp
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = tokens * count
        settings.n_batch = tokens * count
        settings.n_ubatch = ubatch
        settings.n_seq_max = count
        settings.n_threads = settings.n_threads_batch = threads
        settings.embeddings = True
        settings.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_LAST
        kinds = {"on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}
        settings.flash_attn_type = kinds[flash]
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._model or not self._context:
            raise SystemExit(f"llama.cpp cannot load {path}")

    def read(self, passages: Passages) -> None:
        c = self._c
        c.llama_memory_clear(c.llama_get_memory(self._context), False)
        total = sum(map(len, passages))
        batch = c.llama_batch_init(total, 0, 1)
        batch.n_tokens = total
        at = 0
        for sequence, ids in enumerate(passages):
            for position, token in enumerate(ids.tolist()):
                batch.token[at], batch.pos[at] = token, position
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = True  # of an embedding model, every token is an output
                at += 1
        status = c.llama_decode(self._context, batch)
        c.llama_batch_free(batch)
        if status or not all(c.llama_get_embeddings_seq(self._context, one) for one in range(len(passages))):
            raise SystemExit(f"llama_decode of {total} tokens returned {status}")


def serve(options: argparse.Namespace) -> None:
    """Measure whenever a line comes: its seed makes the passages."""
    kind, *settings = options.serve.split(",")
    size = options.threads, options.tokens, options.count
    engine: Any = Npqwen(options.model, *size) if kind == "npqwen" else None
    if engine is None:
        engine = Llama(options.gguf, *size, settings[0], int(settings[1]))
    for line in sys.stdin:
        random = np.random.default_rng(int(line))
        ids = random.integers(1000, 4000, (options.count, options.tokens)).astype(np.int32)
        ids[:, : options.shared] = ids[0, : options.shared]
        start = time.perf_counter()
        engine.read(list(ids))
        print(json.dumps(time.perf_counter() - start), flush=True)


@contextmanager
def contender(name: str) -> Iterator[subprocess.Popen[str]]:
    """This script as the process of a contender."""
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        yield process
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait()


def measured(process: subprocess.Popen[str], seed: int) -> float:
    """Seconds for the passages of a seed."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{seed}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a contender ended")
    return float(json.loads(line))


def cell(count: int, seconds: Sequence[float]) -> str:
    """Median and range in passages a second."""
    return f"{count / median(seconds):.2f} ({count / max(seconds):.2f}-{count / min(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a converted model")
    parser.add_argument("gguf", help="llama.cpp's file of the same checkpoint")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=256, help="of each passage")
    parser.add_argument("--count", type=int, default=8, help="passages at a time")
    parser.add_argument("--shared", type=int, default=0, help="tokens with which all begin")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    names = ["npqwen", *(f"llama,{flash},{ubatch}" for flash, ubatch in LLAMA)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(contender(name)) for name in names}
        for name in names:
            measured(processes[name], 0)  # reads the weights
        for number in range(1, options.rounds + 1):
            for name in names[:: -1 if number % 2 else 1]:
                time.sleep(SETTLE_SECONDS)
                seconds[name].append(measured(processes[name], number))
    print(f"\n{options.count} passages of {options.tokens} tokens, {options.threads} threads\n")
    print("| | passages/s |\n|---|---|")
    for name in names:
        print(f"| {name} | {cell(options.count, seconds[name])} |")
    best = min(names[1:], key=lambda name: median(seconds[name]))
    ratios = [theirs / ours for theirs, ours in zip(seconds[best], seconds["npqwen"], strict=True)]
    print(f"\nnpqwen is {median(ratios):.2f} times ({min(ratios):.2f}-{max(ratios):.2f}) as fast as {best}")


if __name__ == "__main__":
    main()
