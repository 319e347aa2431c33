#!/usr/bin/env python3
"""What each recipe costs: KL divergence of a converted model's next-token distributions from the unquantized model's.

    python tests/bench/divergence.py [CHECKPOINT] [TEXT] [--bits 8,4]

`npqwen eval` measures it. The text is divided into windows of 256 tokens; an incomplete last one does not count. The
base is the checkpoint in bf16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from npqwen_quant import convert

from npqwen.model import Model, load
from npqwen.reports.evaluation import evaluate
from npqwen.reports.evaluation_report import Evaluation
from npqwen.reports.info import inspect

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
WINDOW = 256


def divergence(base: Model, model: Model, text: str) -> Evaluation:
    """Compare a model with the base on the text's whole windows."""
    ids = base.tokenizer.encode(text)
    return evaluate(model, {"text": ids[: len(ids) // WINDOW * WINDOW]}, base, window=WINDOW, prompts=0)


def table(directories: Mapping[int, Path], found: Mapping[int, Evaluation]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| bits | bits per weight | embedding, % of bytes | perplexity | KL mean | 99 % | top-1, % |"
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for bits, evaluation in found.items():
        info, score = inspect(directories[bits]), evaluation.total
        share = info.parts["embedding"] / info.weights
        d = score.divergence
        assert d is not None
        yield (
            f"| {bits} | {info.bits_per_weight:.2f} | {share:.1%} | {score.perplexity.mean:.4f} "
            f"| {d.kl.mean:.6f} ± {d.kl.error:.6f} | {d.kl_99:.4f} | {d.top_1.mean:.2%} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=TINY)
    parser.add_argument("text", type=Path, nargs="?", default=TINY / "heldout.txt")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    chosen = [int(bits) for bits in options.bits.split(",")]
    text = options.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        directories = {bits: Path(place) / str(bits) for bits in (16, *chosen)}
        for bits, directory in directories.items():
            convert(options.checkpoint, directory, bits=bits)
        found = {}
        with load(directories[16], threads=options.threads) as base:
            if len(base.tokenizer.encode(text)) < WINDOW:
                sys.exit(f"{options.text} has fewer than {WINDOW} tokens")
            for bits in chosen:
                with load(directories[bits], threads=options.threads) as model:
                    found[bits] = divergence(base, model, text)
        evaluation = found[chosen[0]]
        assert evaluation.total.divergence is not None
        nll = evaluation.total.divergence.base_nll.mean
        print(f"{options.checkpoint}: {evaluation.total.tokens} tokens of {options.text}")
        print(f"The base needs {nll:.4f} nats per token.\n")
        print("\n".join(table(directories, found)))


if __name__ == "__main__":
    main()
