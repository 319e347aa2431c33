#!/usr/bin/env python3
"""Compare AArch64's integer kernels with the fewest instructions that they could have. Nothing here is measured.

    python tests/bench/neon_mix.py [--mca llvm-mca-19]

The inner loops are compiled for a core (tests/assembly.py), and llvm-mca (Debian's llvm-19) simulates them with LLVM's
model of a core: that of the Neoverse N1, the server variant of the Cortex-A76, for which LLVM uses the model of an
older core, and of the Neoverse N2 for `smmla`. Both have two vector pipes. Four micro-operations a cycle are
dispatched, as the A76 decodes four instructions.

Prints a Markdown table. For two blocks (64 columns) it has the instructions, those of them that copy vectors and that
spill, the bound in cycles and what sets it, the simulated cycles, and the bound's share of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assembly import CORTEX_A76, integer_loop, mnemonics, spills

from npqwen.format.encodings import INT4, INT5, INT6, INT8, Encoding
from npqwen.simd.arm import Neon, NeonI8mm

NEOVERSE_N2 = "aarch64-unknown-linux-gnu", "neoverse-n2"
TURNS, DISPATCH = 200, 4
UNPACKING = {INT4: 16, INT5: 21, INT6: 18, INT8: 0}
"""The fewest vector instructions known to make a block's 8 quads: shift or mask, and lookup; or shift, insert, mask."""
INTERLEAVING = {INT4: 4, INT5: 7, INT6: 6, INT8: 8}
"""The fewest that make octets of a block's lines."""


def bound(isa: Neon, encoding: Encoding, tokens: int, vectors: int) -> tuple[float, str]:
    """Cycles that two blocks take at least: the most of those of vector pipes, of load pipes and of dispatching."""
    paired = isa.pairs and tokens > 1
    products = (4 if paired else 8) * tokens * vectors
    # The scales' extension and conversion; subtraction, scaling and addition of each sum; rows put together again.
    scaling = 2 * vectors + (4 if paired else 3) * tokens * vectors
    unpacking = (UNPACKING[encoding] + (INTERLEAVING[encoding] if paired else 0)) * vectors
    vector = 2 * (products + scaling + unpacking)
    # Lines and block scales, two vectors of activations a token with a start, and their scales.
    starts = tokens // 2 if paired else tokens
    loads = 2 * ((encoding.bits + 1) * vectors + 2 * tokens + starts + -(-tokens // 4)) + -(-encoding.unit_bytes // 128)
    limits = {"vector": vector / 2, "loads": loads / 2, "dispatch": (vector + loads) / DISPATCH}
    limit = max(limits, key=lambda name: limits[name])
    return limits[limit], limit


def simulated(loop: list[str], cpu: str, mca: str) -> float:
    """Cycles of a turn."""
    command = [mca, "-mtriple=aarch64", f"-mcpu={cpu}", f"-iterations={TURNS}", f"-dispatch={DISPATCH}"]
    text = subprocess.run(command, input="\n".join(loop), capture_output=True, text=True, check=True).stdout
    found = re.search(r"Total Cycles:\s*(\d+)", text)
    assert found is not None
    return int(found[1]) / TURNS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mca", default="llvm-mca-19", help="name of the program")
    args = parser.parse_args()
    print("| kernel | tokens x rows | instructions | copies, spills | bound | limit | simulated | share |")
    print("|---|---|---|---|---|---|---|---|")
    for isa, target, cpu in ((Neon(), CORTEX_A76, "neoverse-n1"), (NeonI8mm(), NEOVERSE_N2, "neoverse-n2")):
        for encoding in (INT4, INT5, INT6, INT8):
            for tokens, vectors in isa.tiles.items():
                loop = integer_loop(isa, target, encoding, tokens, vectors)
                copies = sum(name == "mov" and ".16b" in line for name, line in zip(mnemonics(loop), loop, strict=True))
                least, limit = bound(isa, encoding, tokens, vectors)
                cycles = simulated(loop, cpu, args.mca)
                print(f"| {isa.name}, {encoding.name} | {tokens} x {vectors * isa.lanes} | {len(loop)} "
                      f"| {copies}, {len(spills(loop))} | {least:.1f} | {limit} | {cycles:.1f} "
                      f"| {least / cycles:.0%} |")  # fmt: skip


if __name__ == "__main__":
    main()
