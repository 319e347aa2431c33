#!/usr/bin/env python3
"""How close the kernel of gated DeltaNet layers is to this machine's limits.

    python tests/bench/gated_delta.py [--threads 1,2] [--shapes 0.8B,4B,27B] [--rounds 9]

Decoding: one token through all recurrent layers, whose states are read and written once. Beside it, in turns, the same
bytes copied by the same threads. Prefill: 256 tokens through one layer on one thread, in cycles for each token and
value head; a cycle is half the time of a shift and an exclusive or. Beside it, multiplications and multiply-adds of
registers: the recurrence needs four for each 16 floats of the state. Prints medians, and the fastest. One thread is
measured by its processor time: other programs do not count then, but for the memory that they use.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from npqwen.engine.team import Team
from npqwen.kernels.attention import SEQUENCE
from npqwen.kernels.compiled import compile_kernel
from npqwen.kernels.gated_delta import gated_delta, scratch_floats
from npqwen.kernels.pieces import claim, leave, new_state
from npqwen.simd.llvm import I8, I32, Array, Int, Tile, element, fma, operation, prefetch_line, step
from npqwen.simd.tile import FLOATS, LANES, load, store, zeros

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gated_delta_calls import LAYER, Layer, Shape, Tokens

SHAPES = {
    "0.8B": (Shape(16, 16, 128, 128), 18),
    "4B": (Shape(16, 32, 128, 128), 24),
    "27B": (Shape(16, 48, 128, 128), 48),
}
"""A layer's shape, and how many recurrent layers there are."""
PROMPT = 256
_CHUNK = 1 << 14
"""float32 that a thread copies at a time: 64 KiB, as a head's state has."""
_CHAINS = 12


@njit(nogil=True)
def run_layers(
    team: Any, member: int, model: Any, layers: Any, sequences: Any, projected: Any, gates: Any, scratch: Any, out: Any
) -> None:
    """gated_delta for all layers."""
    for i in range(layers.size):
        gated_delta(team, model, layers[i], sequences, projected, gates, scratch[member], out)
    leave(team)


@operation
def copy_vector(b: ir.IRBuilder, source: Array, target: Array, at: Int) -> None:
    """target[at:] = source[at:], a vector at the beginning of a cache line, past the caches."""
    prefetch_line(b, element(b, source, step(b, at, 2048), I8))
    stored = b.store(b.load(element(b, source, at, FLOATS), align=4), element(b, target, at, FLOATS), align=4 * LANES)
    stored.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


@njit(nogil=True)
def copy(team: Any, member: int, source: Any, target: Any) -> None:
    """target = source, chunk by chunk."""
    pieces = source.size // _CHUNK
    while True:
        piece = claim(team, pieces)
        if piece == pieces:
            break
        for at in range(piece * _CHUNK, (piece + 1) * _CHUNK, LANES):
            copy_vector(source, target, at)
    leave(team)


@operation
def multiply_add(b: ir.IRBuilder, sums: Tile, factor: Tile) -> Tile:
    """sums * factor + factor."""
    return [fma(b, value, factor[0], factor[0]) for value in sums]


@njit(nogil=True)
def multiply_adds(turns: int, out: Any) -> None:
    """`_CHAINS` chains of multiply-adds of vectors."""
    factor = load(zeros(1, 1, 1), out, 0, 1, LANES)
    sums = load(zeros(_CHAINS, 1, 1), out, 0, 1, LANES)
    for _ in range(turns):
        sums = multiply_add(sums, factor)
    store(sums, out, 0, 1, LANES)


@njit(nogil=True)
def steps(turns: int, x: int) -> int:
    """`turns` chains of three shifts and three exclusive ors, 6 cycles."""
    for _ in range(turns):
        x ^= x << 13
        x ^= x >> 7
        x ^= x << 17
    return x


def timed(call: Callable[[], object], threads: int = 1) -> float:
    """Seconds: of this thread's processor time if it is the only one."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


class Run:
    """Arrays of a pass of some tokens of one sequence through some layers."""

    def __init__(self, shape: Shape, layers: int, tokens: int, threads: int) -> None:
        self.layer, inputs = Layer(shape), Tokens(shape, tokens, 1)
        self.layers = np.repeat(self.layer.layer, layers).astype(LAYER)
        self.layers["state_index"] = np.arange(layers)
        floats = -(-layers * shape.state_floats // _CHUNK) * _CHUNK
        # At the beginning of a cache line, as the engine's are.
        raw = [np.zeros(floats + 16, np.float32) for _ in range(2)]
        self.states = [array[-array.ctypes.data // 4 % 16 :][:floats] for array in raw]
        self.states[0][:] = np.random.default_rng(0).standard_normal(floats, np.float32)
        self.states[1][:] = 0
        self.projected = inputs.projected
        self.gates = np.zeros((tokens, 2 * shape.padded), np.float32)
        self.gates[:, : shape.heads] = inputs.b
        self.gates[:, shape.padded : shape.padded + shape.heads] = inputs.a - 4
        self.out = np.empty((tokens, shape.heads * shape.dim), np.float32)
        self.scratch = np.zeros((threads, scratch_floats(shape.key_dim, shape.dim)), np.float32)
        self.records = np.zeros(1, SEQUENCE)
        self.records["tokens"] = tokens
        self.bytes = 8 * floats
        args = self.args()
        compile_kernel(run_layers, (new_state(1)[1], 0, *args))
        compile_kernel(copy, (new_state(1)[1], 0, *self.states))

    def args(self) -> tuple[Any, ...]:
        """The arguments of run_layers; the states change places."""
        self.states.reverse()
        self.records["state"], self.records["next_state"] = (state.ctypes.data for state in self.states)
        return self.layer.model[0], self.layers, self.records, self.projected, self.gates, self.scratch, self.out


def decode(name: str, threads: int, rounds: int) -> None:
    shape, layers = SHAPES[name]
    run, team = Run(shape, layers, 1, threads), Team(threads)
    taken, copied = [], []
    for _ in range(rounds):
        for _ in range(3):
            args = run.args()
            taken.append(timed(lambda: team.run(run_layers, *args, on_caller=True), threads))  # noqa: B023
        for _ in range(3):
            run.states.reverse()
            copied.append(timed(lambda: team.run(copy, *run.states, on_caller=True), threads))
    team.close()
    best, usual = run.bytes / min(taken) / 1e9, run.bytes / median(taken) / 1e9
    print(
        f"| decode {name} | {threads} | {median(taken) * 1e3:.2f} ms ({min(taken) * 1e3:.2f}) | "
        f"{usual:.1f} GB/s ({best:.1f}), copying {run.bytes / median(copied) / 1e9:.1f} "
        f"({run.bytes / min(copied) / 1e9:.1f}) | {median(copied) / median(taken):.0%} |",
        flush=True,
    )


def prefill(name: str, rounds: int) -> None:
    shape, _ = SHAPES[name]
    run, team = Run(shape, 1, PROMPT, 1), Team(1)
    sums, turns = np.zeros(_CHAINS * LANES, np.float32), 200_000
    steps(1, 1)
    multiply_adds(1, sums)
    taken, cycle, fma_ = [], [], []
    for _ in range(rounds):
        for _ in range(3):
            args = run.args()
            taken.append(timed(lambda: team.run(run_layers, *args, on_caller=True)))  # noqa: B023
        cycle.append(timed(lambda: steps(turns, 1)) / turns / 6)
        fma_.append(timed(lambda: multiply_adds(turns, sums)) / turns / _CHAINS)
    team.close()
    each = median(taken) / PROMPT / shape.heads
    needed = 4 * shape.key_dim * shape.dim / LANES * median(fma_)
    print(
        f"| prefill {name} | 1 | {median(taken) * 1e3 / PROMPT:.3f} ms ({min(taken) * 1e3 / PROMPT:.3f}) a token | "
        f"{each / median(cycle):.0f} cycles a token and head, "
        f"{median(cycle) / median(fma_):.2f} multiply-adds a cycle | {needed / each:.0%} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--shapes", default="0.8B,4B,27B")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| | threads | time | rate | share of the limit |\n|---|---:|---|---|---:|")
    for name in options.shapes.split(","):
        for threads in map(int, options.threads.split(",")):
            decode(name, threads, options.rounds)
        prefill(name, options.rounds)


if __name__ == "__main__":
    main()
