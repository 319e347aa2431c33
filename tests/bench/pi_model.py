#!/usr/bin/env python3
"""Predict the speed of a Raspberry Pi 5 by arithmetic. Nothing here is measured.

    python tests/bench/pi_model.py [--prefill 512] [--depth 512] [--busy 0.8] [--bandwidth 11.4] [--loops]

The inner loops are compiled for the Cortex-A76 (tests/assembly.py) and their instructions counted by execution pipe;
the models' shapes say how often the loops run and how many bytes a token reads. A token takes the longer of the two
times, memory's and the pipes'. Prints the Markdown tables of docs/raspberry-pi.md, which lists the assumptions.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assembly import CORTEX_A76, floating_loop, integer_loop

from npqwen.engine.engine import CHUNK, SPARSE_CHUNK
from npqwen.format.encodings import INT3, INT4, INT8, Encoding
from npqwen.kernels.attention import POSITION_TILE
from npqwen.simd.arm import Neon

CORES, HERTZ = 4, 2.4e9
BARRIER, BARRIERS = 1e-6, 10
"""Seconds of a barrier, and barriers per layer."""
VOCABULARY = 151_936


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model's shape. experts: of a mixture, `active` of them per token."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    tied: bool
    experts: int = 1
    active: int = 1

    @property
    def attention_weights(self) -> int:
        """In all layers."""
        return self.layers * self.hidden * 128 * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_weights(self) -> int:
        """One expert in all layers, or the feed-forward part of a dense model."""
        return self.layers * 3 * self.hidden * self.inner

    @property
    def layer_weights(self) -> int:
        """Weights that one token uses, without the output matrix."""
        return self.attention_weights + self.active * self.expert_weights

    @property
    def output_weights(self) -> int:
        return self.hidden * VOCABULARY

    @property
    def all_weights(self) -> int:
        embeddings = self.output_weights * (1 if self.tied else 2)
        return self.attention_weights + self.experts * self.expert_weights + embeddings

    @property
    def cache_bytes(self) -> int:
        """Bytes of one position: float16 keys and values."""
        return self.layers * 2 * self.kv_heads * 128 * 2


SHAPES = (
    Shape("0.6B", 1024, 28, 16, 8, 3072, True),
    Shape("1.7B", 2048, 28, 16, 8, 6144, True),
    Shape("4B", 2560, 36, 32, 8, 9728, True),
    Shape("8B", 4096, 36, 32, 8, 12288, False),
    Shape("14B", 5120, 40, 40, 8, 17408, False),
    Shape("30B-A3B", 2048, 48, 32, 4, 768, False, 128, 8),
)


@dataclass
class Pipes:
    """Micro-operations of a loop by pipe, in LLVM's model of the Neoverse N1, the Cortex-A76's server variant."""

    either: int = 0
    first: int = 0
    second: int = 0
    load: int = 0
    whole: int = 0
    instructions: int = 0

    @property
    def cycles(self) -> float:
        """Lower bound: two vector pipes, two for loads and stores, three for integers, four instructions decoded."""
        vector = max(self.first, self.second, (self.either + self.first + self.second) / 2)
        return max(vector, self.load / 2, self.whole / 3, self.instructions / 4)


def pipes(loop: list[str]) -> Pipes:
    """Count a loop's micro-operations; an unknown instruction is an error."""
    out = Pipes(instructions=len(loop))
    for line in loop:
        name, _, operands = line.partition("\t")
        if name in ("scvtf", "fcvtl", "fcvtl2", "fcvtzs", "frintn"):
            out.first += 2
        elif name in ("ushr", "sshr", "shl", "ushll", "ushll2", "shll", "shll2", "sshll", "sshll2", "usra"):
            out.second += 1
        elif name in ("ldr", "ldur", "prfm", "prfum"):
            out.load += 1
        elif name == "ldp":
            out.load += 2
        elif name == "ld1r":
            out.load, out.either = out.load + 1, out.either + 1
        elif name in ("str", "stur", "stp"):
            out.load, out.either = out.load + (4 if name == "stp" else 2), out.either + 2
        elif name == "dup" and re.search(r", [wx]\d", operands):
            out.whole += 1
        elif re.match(r"[vqds]\d", operands):
            assert name in (
                "sdot",
                "and",
                "add",
                "mov",
                "movi",
                "fmov",
                "fadd",
                "fsub",
                "fmul",
                "fmla",
                "dup",
                "orr",
                "tbl",
            ), line
            out.either += 1
        else:
            assert name in ("add", "sub", "subs", "cmp", "mov", "lsl", "madd") or name.startswith("b."), line
            out.whole += 1
    return out


@dataclass(frozen=True)
class Costs:
    """Cycles per multiply-add, by kind of loop."""

    encoding: Encoding
    one: float
    """Matrices, one token."""
    many: float
    """Matrices, tiles of several tokens."""
    attention: float


def costs(encoding: Encoding) -> Costs:
    isa, most = Neon(), max(Neon.tiles)

    def integers(tokens: int) -> float:
        rows = isa.tiles[tokens]
        return pipes(integer_loop(isa, CORTEX_A76, encoding, tokens, rows)).cycles / (64 * isa.lanes * rows * tokens)

    rows = max(1, min(POSITION_TILE // isa.lanes, isa.accumulators // most))
    columns = max(1, min(4, isa.accumulators // (rows * most)))
    halves = pipes(floating_loop(isa, CORTEX_A76, "half", most, rows, columns)).cycles
    return Costs(encoding, integers(1), integers(most), halves / (isa.lanes * rows * most * columns))


def decode(shape: Shape, cost: Costs, depth: int, busy: float, bandwidth: float) -> tuple[float, float]:
    """Seconds of decoding a token at `depth`: memory's and the pipes'."""
    weights = shape.layer_weights + shape.output_weights
    memory = (weights * cost.encoding.bits_per_weight / 8 + depth * shape.cache_bytes) / bandwidth
    group = shape.heads // shape.kv_heads
    rows = -(-group // max(Neon.tiles)) * max(Neon.tiles) if group > 1 else 1
    scores = shape.layers * shape.kv_heads * rows * 2 * 128 * depth
    cycles = weights * cost.one + scores * cost.attention
    wait = shape.layers * BARRIERS * BARRIER
    return memory + wait, cycles / (CORES * HERTZ * busy) + wait


def prefill(shape: Shape, cost: Costs, tokens: int, busy: float, bandwidth: float) -> float:
    """Seconds of a prompt, in chunks that each read all weights once."""
    piece = CHUNK if shape.experts == 1 else SPARSE_CHUNK
    stored = shape.attention_weights + shape.experts * shape.expert_weights
    memory = -(-tokens // piece) * stored * cost.encoding.bits_per_weight / 8 / bandwidth
    # A token sees half of the prompt on average.
    scores = shape.layers * shape.heads * 2 * 128 * tokens * tokens / 2
    cycles = tokens * shape.layer_weights * cost.many + scores * cost.attention
    return max(memory, cycles / (CORES * HERTZ * busy))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--depth", type=int, default=512, help="tokens in the cache when one more is decoded")
    parser.add_argument("--busy", type=float, default=0.8, help="utilization of the busiest pipe")
    parser.add_argument("--bandwidth", type=float, default=11.4, help="GB/s of four cores")
    parser.add_argument("--loops", action="store_true", help="print only the inner loops")
    args = parser.parse_args()
    if args.loops:
        print_loops()
        return
    print(f"| model | bits | weights, GB | prefill {args.prefill}, tok/s | decode at {args.depth}, tok/s "
          "| memory's time | pipes' time |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for encoding in (INT3, INT4, INT8):
            cost = costs(encoding)
            start = prefill(shape, cost, args.prefill, args.busy, args.bandwidth * 1e9)
            memory, cpu = decode(shape, cost, args.depth, args.busy, args.bandwidth * 1e9)
            size = shape.all_weights * encoding.bits_per_weight / 8 / 1e9
            print(f"| {shape.name} | {encoding.bits} | {size:.2f} | {args.prefill / start:.3g} "
                  f"| {1 / max(memory, cpu):.3g} | {1e3 * memory:.0f} ms | {1e3 * cpu:.0f} ms |")  # fmt: skip


def print_loops() -> None:
    isa = Neon()
    print("| loop | tokens x rows | instructions | `sdot` and `fmla` | vector, load, integer operations "
          "| cycles | multiply-adds a cycle |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for encoding in (INT4, INT8):
        for tokens, vectors in isa.tiles.items():
            loop = integer_loop(isa, CORTEX_A76, encoding, tokens, vectors)
            row(f"{encoding.name}, 64 columns", tokens, vectors, loop, 64)
    row("attention, 1 column", 4, 4, floating_loop(isa, CORTEX_A76, "half", 4, 4, 1), 1)


def row(name: str, tokens: int, vectors: int, loop: list[str], columns: int) -> None:
    count = pipes(loop)
    multiplies = sum(line.startswith(("sdot", "fmla")) for line in loop)
    vector = count.either + count.first + count.second
    work = columns * Neon.lanes * vectors * tokens
    print(f"| {name} | {tokens} x {Neon.lanes * vectors} | {len(loop)} | {multiplies} "
          f"| {vector}, {count.load}, {count.whole} | {count.cycles:.1f} | {work / count.cycles:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
