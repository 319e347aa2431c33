#!/usr/bin/env python3
"""Compare npqwen's speed with OpenVINO GenAI's and ONNX Runtime GenAI's, on one checkpoint, in one interleaved run.

    python tests/bench/versus_openvino.py CHECKPOINT --python build/genai/bin/python --threads 1,2

The two need PyTorch to convert a checkpoint, and a Python environment of their own, whose interpreter is --python:

    python -m venv build/genai
    build/genai/bin/pip install openvino-genai optimum-intel nncf onnxruntime-genai onnx onnx_ir
    build/genai/bin/pip uninstall -y torchvision

The build of torch for CPUs is enough. torchvision is not needed, and prevents the conversion where it does not fit
torch. Used with openvino-genai 2026.4, optimum-intel 2.2, nncf 3.4, torch 2.13 and onnxruntime-genai 0.18.

All three convert the checkpoint unless the work directory already has it. Their engines, a process for each, take turns
at every measurement (interleave.py) after one that does not count. OpenVINO and ONNX Runtime run in several variants,
of which the fastest is their result: for OpenVINO its default precision, which is bf16 on processors with AMX, also
with a float16 cache, and f32 with activations quantized in larger groups than by default; for ONNX Runtime two sizes of
blocks. What is measured is described in genai_engine.py. Prints a Markdown table: medians and ranges in tokens per
second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interleave import (
    Child,
    Result,
    Worker,
    add_checkpoint_options,
    add_measure_options,
    context_for,
    machine_lines,
    measures,
    new_result,
    parsed,
    progress,
    put_out_of_memory,
    speed_cell,
    take_turns,
    write_rounds,
)

from npqwen.format.recipe import RECIPES

GENAI_ENGINE = Path(__file__).with_name("genai_engine.py")
PEERS = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
"""Engines of genai_engine.py, and their names in the report."""


@dataclass(frozen=True)
class Variant:
    """A conversion by one of the two peers, and settings to run it with."""

    peer: str
    conversion: str
    """The converted directory's name, and a key of CONVERSIONS."""
    properties: dict[str, str] = field(default_factory=dict)
    settings: str = ""
    """What the properties are called in the report."""

    def label(self) -> str:
        """The variant's name without its engine's."""
        return ", ".join(filter(None, [self.conversion.partition(" ")[2], self.settings]))

    def contender(self) -> str:
        """A name that no other variant has."""
        return f"{PEERS[self.peer]}, {self.label()}"


CONVERSIONS = {
    # Embedding and head in int4, too; by default they are int8.
    "openvino int4 g64": ["--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0", "--all-layers"],
    "openvino int8": ["--weight-format", "int8", "--sym"],
    "onnxruntime int4 b32": ["-p", "int4", "--extra_options", "block_size=32", "accuracy_level=4"],
    "onnxruntime int4 b128": ["-p", "int4", "--extra_options", "block_size=128", "accuracy_level=4"],
    "onnxruntime int8 b32": ["-p", "int8", "--extra_options", "block_size=32", "accuracy_level=4"],
}
"""Options of a peer's converter for each kind of weights. Accuracy level 4 multiplies in int8.

ONNX Runtime's scales are f32, and with int8 weights its embedding, from which rows are read, is f32 beside the head.
"""
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
VARIANTS = {
    4: [
        Variant("openvino", "openvino int4 g64"),
        Variant("openvino", "openvino int4 g64", F32 | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}, "f32 dq64"),
        Variant("openvino", "openvino int4 g64", {"KV_CACHE_PRECISION": "f16"}, "f16 cache"),
        Variant("onnxruntime", "onnxruntime int4 b32"),
        Variant("onnxruntime", "onnxruntime int4 b128"),
    ],
    8: [
        Variant("openvino", "openvino int8"),
        # The largest group: activations have one scale a token.
        Variant("openvino", "openvino int8", F32 | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(2**64 - 1)}, "f32 dq row"),
        Variant("openvino", "openvino int8", {"KV_CACHE_PRECISION": "f16"}, "f16 cache"),
        Variant("onnxruntime", "onnxruntime int8 b32"),
    ],
}
"""Bits -> what the peers run."""


def convert_for_peer(python: Path, checkpoint: Path, variant: Variant, out: Path) -> None:
    """Convert a checkpoint in the peers' Python environment, with the converter's messages in a file beside `out`."""
    start = time.perf_counter()
    partial = out.with_name(out.name + ".part")
    if variant.peer == "openvino":
        command = ["optimum.commands.optimum_cli", "export", "openvino", "-m", str(checkpoint)]
        command += ["--task", "text-generation-with-past", "--disable-convert-tokenizer"]
        command += [*CONVERSIONS[variant.conversion], str(partial)]
    else:
        command = ["onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(partial), "-e", "cpu"]
        command += ["-c", str(out.with_name("cache")), *CONVERSIONS[variant.conversion]]
    log = out.with_name(out.name + ".log")
    with log.open("wb") as messages:
        done = subprocess.run(
            [str(python), "-m", *command],
            stdout=messages,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        raise SystemExit(f"{PEERS[variant.peer]} cannot convert {checkpoint}: see {log}")
    partial.rename(out)
    progress(f"{out} written in {time.perf_counter() - start:.1f} s")


def prepare(bits: int, options: argparse.Namespace) -> tuple[Path, dict[str, tuple[Variant, Path]]]:
    """The path of npqwen's model, and by name each chosen variant and its path, converted if they are missing."""
    options.work.mkdir(parents=True, exist_ok=True)
    ours = options.work / f"npqwen-{bits}"
    if not (ours / "config.json").exists():
        from npqwen_quant import convert

        start = time.perf_counter()
        convert(options.checkpoint, ours, bits=bits)
        progress(f"{ours} written in {time.perf_counter() - start:.1f} s")
    theirs = {}
    for variant in VARIANTS[bits]:
        if variant.peer in options.peers:
            path = options.work / variant.conversion.replace(" ", "-")
            if not path.exists():
                convert_for_peer(options.python, options.checkpoint, variant, path)
            theirs[variant.contender()] = variant, path
    return ours, theirs


@contextmanager
def contenders(
    ours: Path, theirs: dict[str, tuple[Variant, Path]], threads: int, context: int, python: Path
) -> Iterator[dict[str, Worker]]:
    """A child process for each contender, by name."""
    with ExitStack() as stack:
        children: dict[str, Worker] = {"npqwen": Child("npqwen", ours, threads, context)}
        stack.callback(children["npqwen"].close)
        for name, (variant, path) in theirs.items():
            command = [str(python), str(GENAI_ENGINE), variant.peer, str(path), "--threads", str(threads)]
            command += ["--context", str(context), "--properties", json.dumps(variant.properties)]
            children[name] = Worker(name, command)
            stack.callback(children[name].close)
        yield children


def run(options: argparse.Namespace) -> tuple[list[Result], dict[str, Any]]:
    """All results, and the engines' versions, sizes of files and peak memory."""
    results: list[Result] = []
    about: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    memory: dict[str, int | None] = {}
    plan = (options.prefill, options.decode, options.depth, ())
    context = context_for(*plan)
    for bits in options.bits:
        ours, theirs = prepare(bits, options)
        models = {f"npqwen {RECIPES[bits].name}": ours}
        models |= {variant.conversion: path for variant, path in theirs.values()}
        sizes |= {name: size(path) for name, path in models.items()}
        for threads in options.threads:
            rows: dict[str, Result] = {}
            for _ in range(options.restarts):
                for path in models.values():
                    put_out_of_memory(path)
                with contenders(ours, theirs, threads, context, options.python) as children:
                    for child in children.values():
                        about |= child.about["about"]
                    for name, tokens, request, _ in measures(*plan):
                        result = rows.setdefault(name, new_result(bits, threads, name, tokens, children))
                        # OpenVINO compiles code for each new shape: everyone warms up with the request itself.
                        for child in children.values():
                            child.ask(**request)
                        for contender, answer in take_turns(children, request, options.repeat):
                            result.seconds[contender].append(answer["seconds"])
                            result.cpu_seconds[contender].append(answer["cpu_seconds"])
                        progress(text_row(result, options.peers))
                    for contender, child in children.items():
                        memory[f"{bits} bits, {contender}"] = child.ask(measure="memory")["bytes"]
            results += rows.values()
    return results, about | {"bytes of files": sizes, "peak memory, bytes": memory}


def size(model: Path) -> int:
    """Bytes of a directory's weights: all but small files and the tokenizer."""
    weights = (".safetensors", ".bin", ".onnx", ".data")
    return sum(path.stat().st_size for path in model.iterdir() if path.suffix in weights)


def text_row(result: Result, peers: Sequence[str]) -> str:
    """A Markdown table row: npqwen, then each peer's fastest variant."""
    row = [RECIPES[result.bits].name, str(result.threads), result.name]
    row.append(speed_cell(result.tokens, result.seconds["npqwen"]))
    shares = [result.cpu_share("npqwen")]
    for peer in peers:
        variants = {one.contender(): one for one in VARIANTS[result.bits] if one.peer == peer}
        rival = result.fastest(variants)
        row += [speed_cell(result.tokens, result.seconds[rival]), variants[rival].label(), f"{result.ratio(rival):.2f}"]
        shares.append(result.cpu_share(rival))
    return "| " + " | ".join([*row, "/".join(f"{share:.2f}" for share in shares)]) + " |"


def report(results: Sequence[Result], about: dict[str, Any], options: argparse.Namespace) -> str:
    """The report in Markdown: the machine, the engines and the table."""
    names = [PEERS[peer] for peer in options.peers]
    columns = ["weights", "threads", "measure", "npqwen"]
    for name in names:
        columns += [name, "variant", "ratio"]
    columns.append("CPU share")
    lines = [
        *machine_lines(options.checkpoint, about),
        "Megabytes of files: "
        + "; ".join(f"{name}: {count / 1e6:.0f}" for name, count in about["bytes of files"].items())
        + ".",
        f"Median (range) of {options.restarts * options.repeat} rounds in tokens/s. "
        "A ratio is of medians: above 1, npqwen is faster. A CPU share "
        f"({'/'.join(['npqwen', *names])}) well below 1 means that other programs were running.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *(text_row(result, options.peers) for result in results),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_checkpoint_options(parser, [4, 8])
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the peers' interpreter (this one)")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help=",".join(PEERS))
    add_measure_options(parser, batch=False)
    parser.set_defaults(prefill=[512, 4096], depth=[0, 4096])
    options = parsed(parser, arguments, VARIANTS)
    if not options.peers or set(options.peers) - set(PEERS):
        parser.error(f"--peers takes {', '.join(PEERS)}")
    if not options.python.is_file():
        parser.error(f"--python {options.python} is not a file; see the first lines of this script")
    results, about = run(options)
    print(report(results, about, options))
    if options.json:
        write_rounds(options.json, options.checkpoint, about, results)


if __name__ == "__main__":
    main()
