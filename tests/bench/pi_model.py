#!/usr/bin/env python3
"""Predict the speed of a Raspberry Pi 5 by arithmetic. Nothing here is measured.

    python tests/bench/pi_model.py [--prefill 512] [--depth 512] [--busy 0.8] [--bandwidth 11.4] [--loops]

The inner loops are compiled for the Cortex-A76 (tests/assembly.py) and their instructions counted by execution pipe;
the models' shapes say how often the loops run and how many bytes a token reads. A token takes the longer of the two
times, memory's and the pipes'. Prints the Markdown tables of docs/raspberry-pi.md, which lists the assumptions.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assembly import CORTEX_A72, CORTEX_A76, floating_loop, integer_loop, unpacked_loop
from make_checkpoint import SIZES
from npqwen_quant.plan import plan

from npqwen.engine.engine import chunk_size
from npqwen.format.config import Config
from npqwen.format.encodings import BF16, ENCODINGS, INT3, INT4, INT5, INT6, INT8, Encoding
from npqwen.format.layout import Experts
from npqwen.format.recipe import recipe_of
from npqwen.kernels.cache_page import POSITION_TILE
from npqwen.simd.arm import Neon
from npqwen.simd.instructions import InstructionSet

CORES, HERTZ = 4, 2.4e9
BARRIER, BARRIERS = 1e-6, 10
"""Seconds of a barrier, and barriers per layer."""
MODELS = ("0.6B", "1.7B", "4B", "8B", "14B", "30B-A3B")


@dataclass(frozen=True)
class Stored:
    """A tensor of matrices of a converted model. Counts are of weights and of bytes."""

    weights: int
    nbytes: int
    encoding: Encoding
    share: float
    """Of the tensor, what one token uses: of a mixture's experts the chosen ones, of an untied embedding next to
    nothing."""


def stored(config: Config, bits: int) -> list[Stored]:
    """The matrices of a model as `--bits` stores them."""
    found = []
    for planned in plan(config, recipe_of(bits)):
        if planned.encoding is None or not planned.sources:
            continue
        share = 1.0
        if planned.name.endswith("embed_tokens.weight") and not config.tie_word_embeddings:
            share = 0.0
        elif config.mixture is not None and isinstance(planned.tensor, Experts):
            share = config.mixture.num_experts_per_tok / config.mixture.num_experts
        weights = sum(math.prod(shape) for shape in planned.sources.values())
        found.append(Stored(weights, planned.nbytes, planned.encoding, share))
    return found


def cache_bytes(config: Config) -> int:
    """Bytes of one position: float16 keys and values."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2


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
        elif re.fullmatch(r"[us]shr|shl|[us]?shll2?|usra|s[lr]i", name):
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
    """Cycles per multiply-add, by kind of loop and encoding."""

    one: dict[Encoding, float]
    """Matrices, one token."""
    many: dict[Encoding, float]
    """Matrices, tiles of several tokens."""
    attention: float


def costs() -> Costs:
    isa, most = Neon(), max(Neon.tiles)

    def integers(encoding: Encoding, tokens: int) -> float:
        rows = isa.tiles[tokens]
        return pipes(integer_loop(isa, CORTEX_A76, encoding, tokens, rows)).cycles / (64 * isa.lanes * rows * tokens)

    rows = max(1, min(POSITION_TILE // isa.lanes, isa.accumulators // most))
    columns = max(1, min(4, isa.accumulators // (rows * most)))
    halves = pipes(floating_loop(isa, CORTEX_A76, "half", most, rows, columns)).cycles
    # A mixture's routers are in bf16; they are too small to show.
    one, many = {BF16: 0.0}, {BF16: 0.0, INT8: integers(INT8, most)}
    # Weights of fewer bits are unpacked once for many tiles.
    unpacked = pipes(unpacked_loop(isa, CORTEX_A76)).cycles / (64 * isa.lanes * isa.unpacked_vectors * most)
    for encoding in ENCODINGS:
        if encoding.is_integer:
            one[encoding] = integers(encoding, 1)
            many.setdefault(encoding, unpacked)
    return Costs(one, many, halves / (isa.lanes * rows * most * columns))


def decode(
    config: Config, matrices: list[Stored], cost: Costs, depth: int, busy: float, bandwidth: float
) -> tuple[float, float]:
    """Seconds of decoding a token at `depth`: memory's and the pipes'."""
    memory = (sum(m.share * m.nbytes for m in matrices) + depth * cache_bytes(config)) / bandwidth
    group = config.num_attention_heads // config.num_key_value_heads
    rows = -(-group // max(Neon.tiles)) * max(Neon.tiles) if group > 1 else 1
    scores = config.num_hidden_layers * config.num_key_value_heads * rows * 2 * config.head_dim * depth
    cycles = sum(m.share * m.weights * cost.one[m.encoding] for m in matrices) + scores * cost.attention
    wait = config.num_hidden_layers * BARRIERS * BARRIER
    return memory + wait, cycles / (CORES * HERTZ * busy) + wait


def prefill(
    config: Config, matrices: list[Stored], cost: Costs, tokens: int, busy: float, bandwidth: float
) -> float:
    """Seconds of a prompt, in chunks that each read all layers once; the output matrix multiplies one token only."""
    layers = [m for m in matrices if m.weights != config.vocab_size * config.hidden_size]
    memory = -(-tokens // chunk_size(config)) * sum(m.nbytes for m in layers) / bandwidth
    # A token sees half of the prompt on average.
    scores = config.num_hidden_layers * config.num_attention_heads * 2 * config.head_dim * tokens * tokens / 2
    cycles = tokens * sum(m.share * m.weights * cost.many[m.encoding] for m in layers) + scores * cost.attention
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
    cost = costs()
    for name in MODELS:
        config = Config.from_dict(SIZES[name])
        for bits in (3, 4, 8):
            matrices = stored(config, bits)
            start = prefill(config, matrices, cost, args.prefill, args.busy, args.bandwidth * 1e9)
            memory, cpu = decode(config, matrices, cost, args.depth, args.busy, args.bandwidth * 1e9)
            print(f"| {name} | {bits} | {sum(m.nbytes for m in matrices) / 1e9:.2f} | {args.prefill / start:.3g} "
                  f"| {1 / max(memory, cpu):.3g} | {1e3 * memory:.0f} ms | {1e3 * cpu:.0f} ms |")  # fmt: skip


def print_loops() -> None:
    isa = Neon()
    print("| loop | tokens x rows | instructions | `sdot` and `fmla` | vector, load, integer operations "
          "| cycles | multiply-adds a cycle |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for encoding in (INT3, INT4, INT5, INT6, INT8):
        for tokens, vectors in isa.tiles.items():
            loop = integer_loop(isa, CORTEX_A76, encoding, tokens, vectors)
            row(f"{encoding.name}, 64 columns", tokens, vectors, loop, 64)
    row("unpacked, 64 columns", max(isa.tiles), isa.unpacked_vectors, unpacked_loop(isa, CORTEX_A76), 64)
    row("attention, 1 column", 4, 4, floating_loop(isa, CORTEX_A76, "half", 4, 4, 1), 1)
    print("\nInstructions a multiply-add, with the dot product and in the portable kernels (Raspberry Pi 4):")
    cores: tuple[tuple[InstructionSet, tuple[str, str]], ...] = ((isa, CORTEX_A76), (InstructionSet(), CORTEX_A72))
    for encoding in (INT4, INT8):
        for core, target in cores:
            for tokens, vectors in core.tiles.items():
                loop = integer_loop(core, target, encoding, tokens, vectors)
                each = len(loop) / (64 * core.lanes * vectors * tokens)
                print(f"{encoding.name}, {target[1]}, {tokens} x {core.lanes * vectors}: {each:.2f}")


def row(name: str, tokens: int, vectors: int, loop: list[str], columns: int) -> None:
    count = pipes(loop)
    multiplies = sum(line.startswith(("sdot", "fmla")) for line in loop)
    vector = count.either + count.first + count.second
    work = columns * Neon.lanes * vectors * tokens
    print(f"| {name} | {tokens} x {Neon.lanes * vectors} | {len(loop)} | {multiplies} "
          f"| {vector}, {count.load}, {count.whole} | {count.cycles:.1f} | {work / count.cycles:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
