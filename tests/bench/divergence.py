#!/usr/bin/env python3
"""What quantizing a model costs: KL divergence of its next-token distributions from the unquantized model's.

    python tests/bench/divergence.py [CHECKPOINT] [TEXT] [--bits 8,4]

The text is divided into pieces of 256 tokens, each run from an empty context; the first token of a piece and an
incomplete last piece do not count. The base is the checkpoint in bf16. Divergences are KL(base || quantized) in nats:
the mean with its standard error, and the 99th percentile. top-1 is how often both have the same likeliest token.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from npqwen_quant import convert

from npqwen.model import Model, load
from npqwen.reports.info import inspect

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
PIECE = 256

Floats = npt.NDArray[np.float64]


@dataclass
class Divergence:
    """A model compared with the base: one number for each predicted token."""

    nll: Floats
    """-log p of the token that follows in the text."""
    kl: Floats
    same_top: npt.NDArray[np.bool_]

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.mean())


def pieces(ids: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """A text's pieces of 256 tokens."""
    return [np.array(ids[at : at + PIECE]) for at in range(0, len(ids) - PIECE + 1, PIECE)]


def divergence(
    base: Model, models: Mapping[int, Model], text: Sequence[npt.NDArray[np.int64]]
) -> dict[int, Divergence]:
    """Compare every model, and the base itself, with the base. Keys are bits."""
    found: dict[int, list[tuple[Floats, ...]]] = {base.bits: [], **{bits: [] for bits in models}}
    for ids in text:
        p = log_softmax(base.logits(ids)[:-1])
        for bits, lines in found.items():
            q = p if bits == base.bits else log_softmax(models[bits].logits(ids)[:-1])
            kl = np.zeros(len(p)) if q is p else (np.exp(p) * (p - q)).sum(1, dtype=np.float64)
            nll = -q[np.arange(len(q)), ids[1:]].astype(np.float64)
            lines.append((nll, kl, p.argmax(1) == q.argmax(1)))
    return {bits: Divergence(*map(np.concatenate, zip(*lines, strict=True))) for bits, lines in found.items()}


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    logits = logits - logits.max(1, keepdims=True)
    whole: npt.NDArray[np.float32] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return whole


def table(directories: Mapping[int, Path], found: Mapping[int, Divergence]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| bits | bits per weight | embedding, % of bytes | perplexity | KL mean | 99 % | top-1, % |"
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for bits, d in found.items():
        info = inspect(directories[bits])
        share = info.parts["embedding"] / info.weights
        error = d.kl.std() / math.sqrt(d.kl.size)
        yield (
            f"| {bits} | {info.bits_per_weight:.2f} | {share:.1%} | {d.perplexity:.4f} "
            f"| {d.kl.mean():.6f} ± {error:.6f} | {np.quantile(d.kl, 0.99):.4f} | {d.same_top.mean():.2%} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=TINY)
    parser.add_argument("text", type=Path, nargs="?", default=TINY / "heldout.txt")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    wanted = [int(bits) for bits in options.bits.split(",") if bits != "16"]
    with tempfile.TemporaryDirectory() as place:
        directories = {bits: Path(place) / str(bits) for bits in (16, *wanted)}
        for bits, directory in directories.items():
            convert(options.checkpoint, directory, bits=bits)
        models = {bits: load(directory, threads=options.threads) for bits, directory in directories.items()}
        try:
            ids = models[16].tokenizer.encode(options.text.read_text(encoding="utf-8"))
            if len(ids) < PIECE:
                sys.exit(f"{options.text} has {len(ids)} tokens; {PIECE} are needed")
            found = divergence(models[16], {bits: models[bits] for bits in wanted}, pieces(ids))
            print(f"{options.checkpoint}: {found[16].kl.size} tokens of {options.text}\n")
            print("\n".join(table(directories, found)))
        finally:
            for model in models.values():
                model.close()


if __name__ == "__main__":
    main()
