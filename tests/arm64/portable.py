"""The same files on two kinds of processor: write what the example model says here, and check it there.

python portable.py write DIRECTORY     convert the example with 4, 8 and 16 bits, keep its answers beside it
python portable.py check DIRECTORY     map these very files, ask again, and compare
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import numpy as np

import npqwen

ROOT = Path(__file__).parents[2]
GOLDEN = np.load(ROOT / "tests" / "data" / "tiny-qwen3.npz")
PROMPTS = range(4)
NEW = 24
# Of the largest logit. Sums in another order round differently, and where that tips an activation from one of its 255
# steps to the next, integer encodings differ by a step; bf16 weights meet float32 activations, with no steps at all.
ALLOWED = {4: 2e-2, 8: 2e-2, 16: 1e-4}


def converted(directory: Path, bits: int) -> Path:
    return directory / f"tiny-qwen3-{bits}"


def answers(path: Path) -> dict[str, np.ndarray]:
    """Logits of each golden prompt, and its greedy continuation by cached steps of one token."""
    out = {}
    with npqwen.load(path, threads=2, context=256) as model:
        for k in PROMPTS:
            ids = GOLDEN[f"ids_{k}"]
            out[f"logits_{k}"] = model.logits(ids)
            cache = model.new_cache()
            logits = model.prefill(ids, cache)
            greedy = []
            for _ in range(NEW):
                greedy.append(int(logits.argmax()))
                logits = model.prefill(greedy[-1:], cache)
            out[f"greedy_{k}"] = np.array(greedy)
    return out


def write(directory: Path) -> None:
    from npqwen_quant import convert

    for bits in ALLOWED:
        path = converted(directory, bits)
        convert(ROOT / "examples" / "tiny-qwen3", path, bits=bits)
        np.savez(directory / f"answers-{bits}.npz", **answers(path), machine=platform.machine())


def check(directory: Path) -> None:
    for bits, allowed in ALLOWED.items():
        start = time.perf_counter()
        found, there = answers(converted(directory, bits)), np.load(directory / f"answers-{bits}.npz")
        compare(f"{bits} bits, {there['machine']}", found, there, allowed)
        if bits == 16:
            compare("16 bits, transformers", found, GOLDEN, allowed)
        print(f"{bits} bits took {time.perf_counter() - start:.0f} s on {platform.machine()}")


def compare(name: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray], allowed: float) -> None:
    worst = 0.0
    for k in PROMPTS:
        logits = expected[f"logits_{k}"]
        worst = max(worst, float(np.abs(found[f"logits_{k}"] - logits).max() / np.abs(logits).max()))
        greedy = expected[f"greedy_{k}"][:NEW]
        if not np.array_equal(found[f"greedy_{k}"], greedy):
            sys.exit(f"{name}: prompt {k} goes on {found[f'greedy_{k}'].tolist()}, there {greedy.tolist()}")
    print(f"{name}: the same {len(PROMPTS) * NEW} greedy tokens; logits differ by {worst:.1e} of the largest")
    if not worst <= allowed:
        sys.exit(f"{name}: {allowed:.0e} is allowed")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
