"""Run the small models' files on two kinds of processor: write their answers on one, and check them on the other.

python portable.py write DIRECTORY             convert them with 4, 8 or 16 bits, keep their answers beside them
python portable.py check DIRECTORY [NAME...]   map these very files, ask again, and compare
"""

from __future__ import annotations

import mmap
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import npqwen
from npqwen.engine.engine import Engine
from npqwen.simd.isa import ISA

ROOT = Path(__file__).parents[2]
MODELS = {
    "tiny-qwen3": (ROOT / "examples" / "tiny-qwen3", (4, 8, 16)),
    "tiny-qwen3-moe": (ROOT / "tests" / "data" / "tiny-qwen3-moe", (4, 16)),
}
"""Checkpoints and the encodings to try; tests/data has what transformers says of them."""
PROMPTS = range(4)
NEW = 24
# Of the largest logit. Sums in another order round differently, and where that tips an activation from one of its 255
# steps to the next, integer encodings differ by a step; bf16 weights meet float32 activations, with no steps at all.
ALLOWED = {4: 2e-2, 8: 2e-2, 16: 1e-4}
# Where such a step changes the order of two experts that score alike, a token goes to another one: in a mixture, one
# token in that many may differ more.
TIPPED = 20
HYBRID = ROOT / "tests" / "data" / "hybrid" / "qwen35"
"""A checkpoint without a tokenizer, whose random weights enlarge every difference."""
HYBRID_ALLOWED = 1e-3


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(ROOT / "tests" / "data" / f"{name}.npz"))


def answers(path: Path, name: str) -> dict[str, np.ndarray]:
    """Logits of each golden prompt, and its greedy continuation by cached steps of one token."""
    out, prompts = {}, golden(name)
    with npqwen.load(path, threads=2, context=256) as model:
        for k in PROMPTS:
            ids = prompts[f"ids_{k}"]
            out[f"logits_{k}"] = model.logits(ids)
            cache = model.new_cache()
            logits = model.prefill(ids, cache)
            greedy, steps = [], []
            for _ in range(NEW):
                steps.append(logits)
                greedy.append(int(logits.argmax()))
                logits = model.prefill(greedy[-1:], cache)
            out[f"greedy_{k}"], out[f"steps_{k}"] = np.array(greedy), np.array(steps)
    return out


def check_hybrid(path: Path) -> None:
    """End the program unless a hybrid's logits, of a text at once and in pieces, are transformers'."""
    expected = golden("hybrid")
    ids, columns = expected["ids-qwen35"], expected["columns"]
    engine = Engine(path, threads=2, context=256)
    whole, cache = engine.logits(ids), engine.new_cache()
    pieces = [engine.forward(part, cache, all_logits=True) for part in np.split(ids, [1, 2, 20, 100])]
    engine.close()
    difference = float(np.abs(whole[:, columns] - expected["qwen35"]).max())
    print(f"qwen35, 16 bits, transformers: logits of {len(ids)} tokens differ by at most {difference:.1e}")
    if difference > HYBRID_ALLOWED or not np.array_equal(np.concatenate(pieces), whole):
        sys.exit(f"qwen35: {HYBRID_ALLOWED:.0e} is allowed, and nothing between passes of different lengths")


def write(directory: Path) -> None:
    from npqwen_quant import convert

    convert(HYBRID, directory / "qwen35-16", bits=16)
    for name, (source, encodings) in MODELS.items():
        for bits in encodings:
            path = directory / f"{name}-{bits}"
            convert(source, path, bits=bits)
            found: dict[str, Any] = {**answers(path, name), "machine": platform.machine()}
            np.savez(directory / f"{name}-{bits}.npz", **found)


def check(directory: Path, *names: str) -> None:
    print(f"{platform.machine()}, {ISA.name} kernels, pages of {mmap.PAGESIZE // 1024} KiB", flush=True)
    if not names:
        check_hybrid(directory / "qwen35-16")
    for name in names or MODELS:
        for bits in MODELS[name][1]:
            start = time.perf_counter()
            found = answers(directory / f"{name}-{bits}", name)
            there = np.load(directory / f"{name}-{bits}.npz")
            compare(f"{name}, {bits} bits, {there['machine']}", found, there, ALLOWED[bits])
            if bits == 16:
                compare(f"{name}, 16 bits, transformers", found, golden(name), ALLOWED[bits])
            print(f"  took {time.perf_counter() - start:.0f} s", flush=True)


def compare(name: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray], allowed: float) -> None:
    """End the program unless greedy tokens are the same and logits close, as shares of the largest of their prompt.

    The logits of the greedy steps are compared, too, up to the first at which another token is chosen: they must be
    close there, so that only a tie explains it. What follows is another text, and not compared; at least nine tenths of
    the tokens are. Logits of transformers' steps are not known: there all tokens are compared.
    """
    rows, same = [], 0

    def differences_of(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(logits - reference).max(axis=1) / np.abs(reference).max())

    for k in PROMPTS:
        rows.append(differences_of(found[f"logits_{k}"], expected[f"logits_{k}"]))
        here, greedy = found[f"greedy_{k}"], expected[f"greedy_{k}"][:NEW]
        differing = np.flatnonzero(here != greedy)
        at = int(differing[0]) if len(differing) else NEW
        same += at
        steps = expected.get(f"steps_{k}")
        if steps is not None:
            rows.append(differences_of(found[f"steps_{k}"][: at + 1], steps[: at + 1]))
        if at < NEW and (steps is None or rows[-1][-1] > allowed):
            sys.exit(f"{name}: prompt {k} goes on {here.tolist()}, there {greedy.tolist()}")
    if same < 0.9 * len(PROMPTS) * NEW:
        sys.exit(f"{name}: only {same} of {len(PROMPTS) * NEW} greedy tokens could be compared")
    differences = np.sort(np.concatenate(rows))
    most = differences[-1 - len(differences) // TIPPED] if "moe" in name else differences[-1]
    print(
        f"{name}: the same {same} of {len(PROMPTS) * NEW} greedy tokens; logits of {len(differences)} tokens differ by "
        f"{np.median(differences):.1e} (median), {most:.1e}, {differences[-1]:.1e} (most)"
    )
    if not (most <= allowed and differences[-1] <= 5 * allowed):
        sys.exit(f"{name}: {allowed:.0e} is allowed")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
