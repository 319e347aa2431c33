#!/usr/bin/env python3
"""How far npqwen is from this machine's limits, and what its first run costs.

    python tests/bench/limits.py MODEL

MODEL is a converted directory, int4 or int8. Prints a Markdown table with

* the matrix kernel's multiply-adds per second on one thread, beside those of its dot products alone (one block in the
  first-level cache, no unpacking, no scales); with AMX, beside its matrix products alone, and beside these with the
  scaling of their sums, for which AMX leaves only one of two vector ports;
* the share of a decoding step on one thread outside the compiled forward pass: arguments, waking the thread, logits,
  sampling, text;
* the seconds to load a model when every kernel must be compiled, and when all are in the cache.

Medians; what is compared takes turns. `npqwen bench` has decoding's share of the read bandwidth.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
from llvmlite import ir
from numba import njit

from npqwen.engine.forward import forward
from npqwen.format.encodings import BLOCK_COLUMNS, CODEBOOK_BYTES, ENCODINGS, UNIT_COLUMNS, UNIT_ROWS, Encoding
from npqwen.format.recipe import RECIPES
from npqwen.generation.stream import Stream
from npqwen.hardware.machine import processor
from npqwen.kernels.matmul import local_floats, matmul, matmul_kernels, scratch_floats
from npqwen.kernels.matrix import MATRIX
from npqwen.kernels.packing import WIDEST, packed_bytes, tile_width
from npqwen.kernels.pieces import new_state
from npqwen.model import Model, load
from npqwen.simd.amx import configure, finish_block, release, start_block
from npqwen.simd.instructions import UNPACKED
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import F32, I8, I32, I64, Array, Const, Float, Int, Tile, element, operation, vector
from npqwen.simd.tile import FLOATS, LANES, zeros

LOAD = "import sys, time; s = time.perf_counter(); from npqwen.model import load; from pathlib import Path; \
load(Path(sys.argv[1])).close(); print(time.perf_counter() - s)"


@operation
def dots(b: ir.IRBuilder, sums: Tile, encoding: Const, w: Array, x: Array, at: Int) -> Tile:
    """sums, a vector for each token, + the block of weights at w @ the tokens' activations at x[at:].

    encoding: a code; below 8 bits, the weights are unpacked. The sums are int32 in vectors of float32.
    """
    kind, block = ENCODINGS[encoding], element(b, w, I64(0), I8)
    products = ISA.products(b, UNPACKED if kind.bits < 8 else kind, None, [block], element(b, x, at, I8), len(sums))
    return [
        b.bitcast(b.add(b.bitcast(total, vector(I32, LANES)), product), FLOATS)
        for total, (product,) in zip(sums, products, strict=True)
    ]


@operation
def kept(b: ir.IRBuilder, sums: Tile) -> Float:
    """A value that depends on all sums, so that none is optimized away."""
    total = ir.Constant(F32, 0.0)
    for value in sums:
        total = b.fadd(total, b.extract_element(value, I32(0)))
    return total


def registers_only(encoding: Encoding) -> Callable[[Any, Any, int], float]:
    """A loop of only the dot products of a block, with as many sums as a kernel has."""
    count, code = min(8, WIDEST), encoding.code

    @njit
    def loop(w: Any, x: Any, turns: int) -> float:
        sums = zeros(count, 1, 1)
        for i in range(turns):
            sums = dots(sums, code, w, x, i * 32 % 2048)
        return kept(sums)

    return loop


def matrices_only(scaled: bool) -> Callable[[Any, Any, int], float]:
    """A loop of only matrix products (AMX) on data in the first-level cache, with or without scaling the sums."""

    @njit
    def loop(w: Any, x: Any, turns: int) -> float:
        sums = zeros(UNIT_ROWS, 1, 1)
        configure()
        room = w[2048:4096]
        for _ in range(turns // 2):
            start_block(1, w, 1024, x, 640)
            if scaled:
                sums = finish_block(sums, 0, w, 0, x, 0, room)
            start_block(0, w, 512, x, 0)
            if scaled:
                sums = finish_block(sums, 1, w, 16, x, 640, room)
        release()
        return kept(sums)

    return loop


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def arithmetic(encoding: Encoding, rows: int, cols: int, tokens: int, repeat: int) -> tuple[float, dict[str, float]]:
    """Multiply-adds per second on this thread: the matrix kernel's, and by name those of its limits."""
    rng = np.random.default_rng(0)
    units = rng.integers(0, 255, (rows // 16, encoding.row_bytes(cols // UNIT_COLUMNS)), np.uint8)
    units[:, : encoding.row_scale_bytes].view(np.float32)[:] = 1e-4
    codebook = np.resize(np.arange(0, 64, 4, dtype=np.uint8), CODEBOOK_BYTES)
    matrix, width = np.zeros(1, MATRIX), tile_width(tokens, encoding.code, False)
    matrix[0] = units.ctypes.data, codebook.ctypes.data, encoding.code, rows, cols
    state = new_state(1)
    kernels, out = matmul_kernels([encoding.code]), np.zeros((tokens, rows), np.float32)
    x = np.zeros(packed_bytes(tokens, cols), np.uint8)
    scratch, local = np.zeros(scratch_floats(cols), np.float32), np.zeros(local_floats(tokens, 1), np.float32)

    def product() -> None:
        matmul(state[1], kernels, matrix[0], x, tokens, width, out, 0, scratch, local)

    if ISA.matrices:
        loops = {"products of matrices alone": matrices_only(False), "these with scaling": matrices_only(True)}
        each = UNIT_ROWS * UNIT_ROWS * BLOCK_COLUMNS
    else:
        loops = {"dot products alone": registers_only(encoding)}
        each = min(8, WIDEST) * LANES * BLOCK_COLUMNS
    memory, turns = np.zeros((1 << 14) + 64, np.uint8), 100_000
    weights = memory[-memory.ctypes.data % 64 :][: 1 << 12]
    activations = np.ones(1 << 13, np.uint8)
    works: list[Callable[[], Any]] = [product, *(partial(loop, weights, activations, turns) for loop in loops.values())]
    for work in works:
        work()
    times = [[seconds(work) for work in works] for _ in range(repeat)]
    made, *most = (median(column) for column in zip(*times, strict=True))
    return rows * cols * tokens / made, dict(zip(loops, (turns * each / t for t in most), strict=True))


def outside(model: Model, tokens: int, repeat: int) -> tuple[float, float]:
    """Seconds per token of a stream, and those in the compiled forward pass, for a model with one thread."""
    prompt = list(range(1, 65))
    inside: list[float] = []

    def timed(*args: Any) -> None:
        inside.append(seconds(lambda: forward(*args)))

    run = model._runner.team.run
    endless = replace(model.generation_config, eos_ids=frozenset())
    pairs = []
    with (
        mock.patch.object(model, "_generation_config", endless),
        mock.patch.object(model._runner.team, "run", lambda _, *args, **options: run(timed, *args, **options)),
    ):
        for _ in range(repeat + 1):
            inside.clear()
            stream = Stream(model, prompt, max_tokens=tokens, speculation=False)
            for _ in stream:
                pass
            steps = len(inside) - 1  # the first is the prompt's
            pairs.append((stream.usage.decode_seconds / steps, sum(inside[1:]) / steps))
    return median(p for p, _ in pairs[1:]), median(q for _, q in pairs[1:])


def loading(model: Path) -> tuple[float, float]:
    """Seconds from import to a loaded model with an empty kernel cache, and with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", LOAD, str(model)]
        environment = os.environ | {"NPQWEN_CACHE": cache}
        first, *others = (
            float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
            for _ in range(4)
        )
    return first, median(others)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    with load(options.model, threads=1) as model:
        encoding = RECIPES[model.bits].matrices
        if not encoding.is_integer:
            parser.error(f"a model of {model.bits} bits has no integer products; give a quantized one")
        rows = model.config.intermediate_size // UNIT_ROWS * 2 * UNIT_ROWS
        cols = -(-model.config.hidden_size // UNIT_COLUMNS) * UNIT_COLUMNS
        made, most = arithmetic(encoding, rows, cols, 256, options.repeat)
        step, bare = outside(model, 64, options.repeat)
    cold, warm = loading(options.model)
    print(f"{options.model.name}: {processor()}, {ISA.name} kernels\n")
    print("| | measured | of | share |\n|---|---:|---:|---:|")
    for name, rate in most.items():
        print(
            f"| matrix kernel, {rows} x {cols} by 256 tokens, 1 thread, G multiply-adds/s, of {name} "
            f"| {made / 1e9:.0f} | {rate / 1e9:.0f} | {made / rate:.0%} |"
        )
    print(
        f"| decoding a token, 1 thread, outside the forward pass, ms | {1e3 * (step - bare):.2f} | {1e3 * step:.2f} "
        f"| {1 - bare / step:.1%} |"
    )
    print(f"| first load, all kernels compiled, s | {cold:.1f} | | |")
    print(f"| later loads, s | {warm:.2f} | | |")


if __name__ == "__main__":
    main()
