#!/usr/bin/env python3
"""What each recipe costs: KL divergence of a converted model's next-token distributions from the unquantized model's.

    python tests/bench/divergence.py [CHECKPOINT] [TEXT] [--bits 8,4] [--ggml q8_0,q4_0,iq4_xs,q4_k_m,q3_k_m]

`npqwen eval` measures it. The text is divided into windows of 256 tokens; an incomplete last one does not count. The
base is the checkpoint in bf16. --ggml: also the recipes of llama.cpp, quantized and run by llama.cpp itself, without
importances; needs `pip install npqwen[bench]`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from npqwen_quant import convert

from npqwen.generation.language_model import LanguageModel
from npqwen.model import Model, load
from npqwen.reports.evaluation import evaluate
from npqwen.reports.evaluation_report import Evaluation
from npqwen.reports.info import inspect

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
WINDOW = 256
HEADER = """\
| | bits per weight | perplexity | KL mean | 99 % | maximum | top-1, % |
|---|---:|---:|---:|---:|---:|---:|"""


def divergence(base: Model, model: LanguageModel, text: str) -> Evaluation:
    """Compare a model with the base on the text's whole windows."""
    ids = base.tokenizer.encode(text)
    return evaluate(model, {"text": ids[: len(ids) // WINDOW * WINDOW]}, base, window=WINDOW, prompts=0)


def row(name: str, bits_per_weight: float, evaluation: Evaluation) -> str:
    """A line of the table."""
    score, d = evaluation.total, evaluation.total.divergence
    assert d is not None
    return (
        f"| {name} | {bits_per_weight:.2f} | {score.perplexity.mean:.4f} "
        f"| {d.kl.mean:.7f} ± {d.kl.error:.7f} | {d.kl_99:.4f} | {d.kl_max:.3f} | {d.top_1.mean:.2%} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=TINY)
    parser.add_argument("text", type=Path, nargs="?", default=TINY / "heldout.txt")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--ggml", default="", help="llama.cpp's recipes, such as q8_0,q4_k_m")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    text = options.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        convert(options.checkpoint, place / "16", bits=16)
        with load(place / "16", threads=options.threads) as base:
            tokens = len(base.tokenizer.encode(text))
            if tokens < WINDOW:
                sys.exit(f"{options.text} has {tokens} tokens; {WINDOW} are needed")
            print(f"{options.checkpoint}: {tokens // WINDOW * (WINDOW - 1)} tokens of {options.text}\n\n{HEADER}")
            for bits in filter(None, options.bits.split(",")):
                convert(options.checkpoint, place / bits, bits=int(bits))
                info = inspect(place / bits)
                with load(place / bits, threads=options.threads) as model:
                    name = f"npqwen, {', '.join(info.encodings)}"
                    print(row(name, info.bits_per_weight, divergence(base, model, text)), flush=True)
            for kind in filter(None, options.ggml.split(",")):
                from ggml_model import GgmlModel, bits_per_weight, quantized

                path = quantized(options.checkpoint, kind, place)
                found = divergence(base, GgmlModel(path, base), text)
                print(row(f"llama.cpp, {kind.upper()}", bits_per_weight(path), found), flush=True)


if __name__ == "__main__":
    main()
