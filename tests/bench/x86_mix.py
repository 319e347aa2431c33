#!/usr/bin/env python3
"""Compare this processor's integer kernels for a few tokens with the throughput of their own instructions.

    chrt -f 5 python tests/bench/x86_mix.py --encodings int4,int5 --tokens 1,2,4,8

A kernel's inner loop is compiled for this processor (tests/assembly.py), and its instructions run once more without
their dependencies: each vector instruction writes another register and reads registers that nothing writes; those that
read memory read the same bytes, in the first-level cache. That is what the instructions allow; counting ports would say
less, as no processor divides mixed instructions among its ports without loss. The kernel multiplies a matrix that fits
the second-level cache. For more tokens than a tile holds, weights are unpacked to bytes once for all tiles.

Prints a Markdown table: vector instructions for 16 rows by 64 columns, nanoseconds that they take without dependencies
and in the kernel, medians of rounds in which both take turns, and the share.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core.registry import cpu_target

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assembly import integer_loop, unpacked_loop, unpacking_loop

from npqwen.format.encodings import BY_NAME, CODEBOOK_BYTES, UNIT_COLUMNS, UNIT_ROWS, Encoding
from npqwen.kernels.compiled import address_of
from npqwen.kernels.matmul import KERNELS, PANELS, scratch_floats
from npqwen.kernels.packing import PANELS_WIDTH, packed_bytes
from npqwen.simd.isa import ISA
from npqwen.simd.tile import LANES

TURNS = 2000
"""How often the instructions run at a time."""
COLUMNS = 1024
MATRIX_BYTES = 200_000
MOVES = ("mov", "lea", "add", "sub", "cmp", "test", "dec", "inc", "j")
"""What names of instructions on scalars and of branches begin with."""


def independent(loop: list[str]) -> list[str]:
    """The instructions of a loop without their dependencies; scalar ones and branches are left out."""
    kept: list[str] = []
    for line in loop:
        name, _, rest = line.partition("\t")
        if not name.startswith(("v", "prefetch")):
            assert name.startswith(MOVES), line
            continue
        operands = re.findall(r"[^,(]*\([^)]*\)|[^,\s]+", rest)
        if name.startswith("prefetch"):
            kept.append(f"{name} ($0)")
            continue
        *sources, target = (re.sub(r"^[^(]*\(.*\)$", "($0)", operand.strip()) for operand in operands)
        # Sources are registers 13 to 15, results go to 0 to 12 in turn.
        sources = [re.sub(r"mm\d+", f"mm{15 - n}", source) for n, source in enumerate(sources)]
        target = "64($0)" if target == "($0)" else re.sub(r"mm\d+", f"mm{len(kept) % 13}", target)
        kept.append(f"{name} {', '.join([*sources, target])}".replace("$", "$$").replace("$$0", "$0"))
    return kept


def instructions(encoding: Encoding, tokens: int, target: tuple[str, str]) -> list[tuple[list[str], int]]:
    """The loops for 16 rows by 64 columns by this many tokens, without dependencies, and how many turns of each."""
    vectors = UNIT_ROWS // LANES
    if tokens in ISA.tiles:
        of_tile = ISA.tiles[tokens]
        return [(independent(integer_loop(ISA, target, encoding, tokens, of_tile)), vectors // of_tile)]
    tiles = -(-tokens // PANELS_WIDTH) * (vectors // ISA.unpacked_vectors)
    once = independent(unpacking_loop(ISA, target, encoding))
    return [(once, 2), (independent(unpacked_loop(ISA, target)), tiles)]


def runner(lines: list[str]) -> Callable[[], None]:
    """A function that runs the instructions TURNS times."""
    module = ir.Module()
    module.triple = llvm.get_process_triple()
    pointer, count = ir.IntType(8).as_pointer(), ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), "run")
    start, turn, end = (function.append_basic_block() for _ in range(3))
    b = ir.IRBuilder(start)
    b.branch(turn)
    b = ir.IRBuilder(turn)
    i = b.phi(count)
    clobbers = ",".join(f"~{{ymm{n}}}" for n in range(16))
    kind = ir.FunctionType(ir.VoidType(), [pointer])
    b.asm(kind, "\n".join(lines), f"r,{clobbers},~{{memory}}", [function.args[0]], side_effect=True)
    after = b.add(i, count(1))
    i.add_incoming(count(0), start)
    i.add_incoming(after, turn)
    b.cbranch(b.icmp_signed("<", after, count(TURNS)), turn, end)
    ir.IRBuilder(end).ret_void()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=llvm.get_host_cpu_name(), opt=2)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("run"))
    memory = np.zeros(256, np.uint8)
    place = memory.ctypes.data + -memory.ctypes.data % 64

    def run(_: object = (engine, memory)) -> None:
        call(place)

    return run


def kernel(encoding: Encoding, tokens: int) -> tuple[Callable[[], None], int]:
    """A function that runs the kernel for this many tokens, and how many times 16 rows by 64 columns it multiplies."""
    size = encoding.row_bytes(COLUMNS // UNIT_COLUMNS)
    groups = MATRIX_BYTES // size
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 255, (groups, size), np.uint8)
    rows[:, : encoding.row_scale_bytes].view(np.float32)[:] = 1e-4
    codebook = np.resize(np.arange(0, 64, 4, dtype=np.uint8), CODEBOOK_BYTES)
    whole = tokens in ISA.tiles
    tiles = 1 if whole else -(-tokens // PANELS_WIDTH)
    x = np.zeros(packed_bytes(tokens, COLUMNS), np.uint8)
    out = np.zeros((max(tokens, tiles * PANELS_WIDTH), groups * UNIT_ROWS), np.float32)
    scratch = np.zeros(4 * scratch_floats(COLUMNS), np.uint8)
    address = address_of(KERNELS[encoding.code][tokens] if whole else PANELS[encoding.code])
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 11)(address)
    arguments = (
        rows.ctypes.data, codebook.ctypes.data, COLUMNS // UNIT_COLUMNS, 0, groups, x.ctypes.data, tiles,
        out.ctypes.data, out.shape[1], 0, scratch.ctypes.data,
    )  # fmt: skip

    def run(_: object = (rows, codebook, x, out, scratch)) -> None:
        call(*arguments)

    return run, groups * COLUMNS // 64


def seconds(work: Callable[[], None], times: int) -> float:
    """Wall-clock seconds of a call, the mean of several."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encodings", type=lambda text: text.split(","), default=["int4", "int5"])
    parser.add_argument("--tokens", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    if LANES != 8 or not ISA.name.startswith("avx"):
        parser.error(f"only kernels of 256-bit vectors on x86-64 can be taken apart; these are {ISA.name}")
    allowed = [name for name, encoding in BY_NAME.items() if encoding.is_integer and encoding.bits < 8]
    if set(options.encodings) - set(allowed):
        parser.error(f"--encodings takes {', '.join(allowed)}")
    if not options.tokens or min(options.tokens) < 1:
        parser.error("--tokens start at 1")
    triple, cpu, _ = cpu_target.target_context.codegen().magic_tuple()
    print(f"{cpu}, {ISA.name} kernels\n")
    print("| encoding | tokens | instructions | alone, ns | in the kernel, ns | share |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in options.encodings:
        for tokens in options.tokens:
            loops = instructions(BY_NAME[name], tokens, (triple, cpu))
            alone, (whole, units) = [runner(loop) for loop, _ in loops], kernel(BY_NAME[name], tokens)
            rounds = [[seconds(whole, 10) / units, *(seconds(run, 2) for run in alone)] for _ in range(options.rounds)]
            made, *parts = (1e9 * median(column) for column in zip(*rounds, strict=True))
            most = sum(part * turns / TURNS for part, (_, turns) in zip(parts, loops, strict=True))
            count = sum(len(loop) * turns for loop, turns in loops)
            print(f"| {name} | {tokens} | {count} | {most:.1f} | {made:.1f} | {most / made:.0%} |", flush=True)


if __name__ == "__main__":
    main()
