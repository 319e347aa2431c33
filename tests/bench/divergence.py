#!/usr/bin/env python3
"""What each recipe costs: KL divergence of a converted model's next-token distributions from the unquantized model's.

    python tests/bench/divergence.py [CHECKPOINT] [TEXT] [--bits 8,4,3] [--calibrate self|FILE]
        [--ggml q8_0,q4_0,iq4_xs,q4_k_m,q3_k_s,iq3_s+self]

`npqwen eval` measures it. The text is divided into windows of 256 tokens; an incomplete last one does not count. The
base is the checkpoint in bf16. --calibrate: conversions of fewer than 8 bits with calibration, too. --ggml: also the
recipes of llama.cpp, quantized and run by llama.cpp itself; needs `pip install npqwen[bench]`. `+self` after one:
quantized with importances, the mean squares of the inputs of each column, of the text that the model itself writes.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npqwen_quant import convert
from npqwen_quant.calibration import Calibration
from numpy.typing import NDArray

from npqwen.commands.calibration import text_named
from npqwen.generation.language_model import LanguageModel
from npqwen.model import Model, load
from npqwen.reports.evaluation import evaluate
from npqwen.reports.evaluation_report import Evaluation
from npqwen.reports.info import inspect
from npqwen.terminal.terminal import Terminal

Ids = NDArray[Any]

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


def written_once(calibration: Calibration) -> Calibration:
    """The calibration, whose text is made only once: models take their time to write it."""
    kept: list[Ids] = []

    def make(place: Path) -> Ids:
        if not kept:
            place.mkdir(exist_ok=True)
            kept.append(calibration.make(place))
        return kept[0]

    return Calibration(calibration.name, make)


def converted_row(
    name: str, base: Model, checkpoint: Path, out: Path, bits: int, text: str, calibration: Calibration | None
) -> str:
    """Convert the checkpoint; the line of the result."""
    convert(checkpoint, out, bits=bits, calibration=calibration)
    with load(out, threads=base.threads) as model:
        return row(f"npqwen, {name}", inspect(out).bits_per_weight, divergence(base, model, text))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=TINY)
    parser.add_argument("text", type=Path, nargs="?", default=TINY / "heldout.txt")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--calibrate", metavar="self|FILE", help="also with calibration, below 8 bits")
    parser.add_argument("--ggml", default="", help="llama.cpp's recipes, such as q8_0,q4_k_m,iq3_s+self")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    text = options.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory, Terminal(quiet=True) as terminal:
        place = Path(directory)
        convert(options.checkpoint, place / "16", bits=16)
        with load(place / "16", threads=options.threads) as base:
            tokens = len(base.tokenizer.encode(text))
            if tokens < WINDOW:
                sys.exit(f"{options.text} has {tokens} tokens; {WINDOW} are needed")
            print(f"{options.checkpoint}: {tokens // WINDOW * (WINDOW - 1)} tokens of {options.text}\n\n{HEADER}")

            @functools.cache
            def calibration(argument: str) -> Calibration:
                return written_once(text_named(argument, terminal).calibration(options.checkpoint))

            for bits in map(int, filter(None, options.bits.split(","))):
                name = f"--bits {bits}"
                print(converted_row(name, base, options.checkpoint, place / name, bits, text, None), flush=True)
                if options.calibrate and bits < 8:
                    name += f" --calibrate {options.calibrate}"
                    made = calibration(options.calibrate)
                    print(converted_row(name, base, options.checkpoint, place / name, bits, text, made), flush=True)
            for kind in filter(None, options.ggml.split(",")):
                import ggml_model

                recipe, _, argument = kind.partition("+")
                columns = None
                if argument:
                    columns = ggml_model.importances(options.checkpoint, calibration(argument).make(place / "text"))
                path = ggml_model.quantized(options.checkpoint, recipe, place, columns)
                found = divergence(base, ggml_model.GgmlModel(path, base), text)
                name = f"llama.cpp, {recipe.upper()}{' with importances' if columns else ''}"
                print(row(name, ggml_model.bits_per_weight(path), found), flush=True)


if __name__ == "__main__":
    main()
