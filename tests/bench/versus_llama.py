#!/usr/bin/env python3
"""Compare npqwen's speed with llama.cpp's, on one checkpoint, in one interleaved run.

    python tests/bench/versus_llama.py CHECKPOINT --threads 1,2 --prefill 512,4096 --depth 0,4096 --bits 4,8

Both sides convert the checkpoint unless the work directory already has it, and read their files from disk first, as
after a restart of the machine: files left in memory by a conversion may lie in small pages, which some machines read
more slowly. Their placement in a virtual machine's memory may matter, too: --restarts reads them, and starts the
engines, several times, each time with more of the memory occupied.

The engines take turns at every measurement (interleave.py). llama.cpp runs with flash attention on and off, and on
with keys and values in q8_0; the fastest of the three is its result. Prints a Markdown table: medians and ranges in
tokens per second.

Needs `pip install npqwen[bench]`, which compiles llama-cpp-python for this machine; the system line in the report says
which instructions it uses.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from interleave import (
    ENGINE,
    SETTLE_SECONDS,
    Child,
    Result,
    add_checkpoint_options,
    add_measure_options,
    context_for,
    machine_lines,
    measures,
    new_result,
    parsed,
    progress,
    put_out_of_memory,
    seconds_cell,
    speed_cell,
    take_turns,
    write_rounds,
)

from npqwen.format.recipe import RECIPES
from npqwen.hardware.machine import available_memory

# Bits -> llama.cpp's format with as many bits and the same block size.
FORMATS = {4: "q4_0", 8: "q8_0", 16: "bf16"}


def prepare(checkpoint: Path, work: Path, bits: int, pure: bool, llama_only: bool) -> tuple[Path, Path]:
    """Paths of both engines' files of a checkpoint, converted if they are missing."""
    import gguf_from_checkpoint as gguf

    kind = FORMATS[bits]
    theirs = work / f"{kind}{'-pure' if pure else ''}.gguf"
    ours = work / f"npqwen-{bits}"
    work.mkdir(parents=True, exist_ok=True)
    if not theirs.exists():
        start = time.perf_counter()
        floats = work / "bf16.gguf"
        if not floats.exists():
            gguf.write_float(checkpoint, floats, "bf16")
        if theirs != floats:
            gguf.quantize(floats, theirs, kind, pure=pure)
        progress(f"{theirs} written in {time.perf_counter() - start:.1f} s")
    if not (ours / "config.json").exists() and not llama_only:
        from npqwen_quant import convert

        start = time.perf_counter()
        convert(checkpoint, ours, bits=bits)
        progress(f"{ours} written in {time.perf_counter() - start:.1f} s")
    return ours, theirs


@contextmanager
def contenders(
    ours: Path, theirs: Path, threads: int, context: int, options: argparse.Namespace
) -> Iterator[dict[str, Child]]:
    """A child process for each contender."""
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        if not options.llama_only:
            children["npqwen"] = Child("npqwen", ours, threads, context)
            stack.callback(children["npqwen"].close)
        for flash in ("on", "off", "q8_0") if options.flash == "all" else (options.flash,):
            name = f"llama.cpp, flash attention {flash}"
            children[name] = Child("llama", theirs, threads, context, flash)
            stack.callback(children[name].close)
        yield children


def run(options: argparse.Namespace) -> tuple[list[Result], dict[str, Any]]:
    """All results, and the engines' versions, settings and peak memory."""
    results: list[Result] = []
    about: dict[str, Any] = {}
    memory: dict[str, int | None] = {}
    plan = (options.prefill, options.decode, options.depth, options.batch)
    context = context_for(*plan)
    for bits in options.bits:
        ours, theirs = prepare(options.checkpoint, options.work, bits, options.pure, options.llama_only)
        for threads in options.threads:
            rows: dict[str, Result] = {}
            for restart in range(options.restarts):
                # Memory that is held makes the files, and copies of them, lie elsewhere.
                held = np.ones((available_memory() or 0) // 2 * restart // options.restarts, np.uint8)
                for model in (theirs,) if options.llama_only else (ours, theirs):
                    put_out_of_memory(model)
                with contenders(ours, theirs, threads, context, options) as children:
                    for child in children.values():
                        about |= child.about["about"]
                    for name, tokens, request, warmup in measures(*plan):
                        result = rows.setdefault(name, new_result(bits, threads, name, tokens, children))
                        for child in children.values():
                            child.ask(**warmup)
                        for contender, answer in take_turns(children, request, options.repeat):
                            result.seconds[contender].append(answer["seconds"])
                            result.cpu_seconds[contender].append(answer["cpu_seconds"])
                        progress(text_row(result))
                    for contender, child in children.items():
                        memory[f"{bits} bits, {contender}"] = child.ask(measure="memory")["bytes"]
                del held
            results += rows.values()
        if options.start:
            results.append(start_to_first_token(ours, theirs, bits, max(options.threads), options))
            progress(text_row(results[-1]))
    return results, about | {"peak memory, bytes": memory}


def start_to_first_token(ours: Path, theirs: Path, bits: int, threads: int, options: argparse.Namespace) -> Result:
    """Seconds from the start of a process to its first token, with its files in the page cache.

    Modules have bytecode, as after installation with pip.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    models = {"llama.cpp": ("llama", theirs)}
    if not options.llama_only:
        models = {"npqwen": ("npqwen", ours)} | models
    result = new_result(bits, threads, "process start to first token", 1, models)
    for round_number in range(options.repeat + 1):
        for name, (kind, model) in models.items():
            command = [sys.executable, str(ENGINE), "first", kind, str(model), "--threads", str(threads)]
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
            if round_number:  # the first is the warm-up
                result.seconds[name].append(time.perf_counter() - start)
    return result


def cell(result: Result, contender: str) -> str:
    """Median and range in tokens per second, or in seconds for a start."""
    if contender not in result.seconds:
        return "-"
    seconds = result.seconds[contender]
    return seconds_cell(seconds) if "start" in result.name else speed_cell(result.tokens, seconds)


def text_row(result: Result) -> str:
    """A Markdown table row."""
    rival = result.fastest(name for name in result.seconds if name != "npqwen")
    ratio = f"{result.ratio(rival):.2f}" if "npqwen" in result.seconds else "-"
    flash = rival.rpartition(" ")[2] if "flash" in rival else ""
    shares = "/".join(f"{result.cpu_share(name):.2f}" for name in ("npqwen", rival) if result.cpu_seconds.get(name))
    weights = RECIPES[result.bits].name
    row = [
        weights if weights == FORMATS[result.bits] else f"{weights} / {FORMATS[result.bits].upper()}",
        str(result.threads),
        result.name,
        cell(result, "npqwen"),
        cell(result, rival),
        flash,
        ratio,
        shares,
    ]
    return "| " + " | ".join(row) + " |"


def report(results: Sequence[Result], about: dict[str, Any], options: argparse.Namespace) -> str:
    """The report in Markdown: the machine, the engines and the table."""
    lines = [
        *machine_lines(options.checkpoint, about),
        f"Median (range) of {options.restarts * options.repeat} rounds in tokens/s. "
        "The ratio is of medians: above 1, npqwen is faster. A CPU share (npqwen/llama.cpp) well below 1 means that "
        "other programs were running.",
        "",
        "| weights | threads | measure | npqwen | llama.cpp | flash attention | ratio | CPU share |",
        "|---|---|---|---|---|---|---|---|",
        *map(text_row, results),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_checkpoint_options(parser, [4])
    add_measure_options(parser)
    parser.add_argument("--start", action="store_true", help="also time a process's start to its first token")
    parser.add_argument("--flash", choices=("all", "on", "off", "q8_0"), default="all", help="llama.cpp's attention")
    parser.add_argument("--pure", action="store_true", help="quantize llama.cpp's embedding like the other matrices")
    parser.add_argument("--llama-only", action="store_true")
    options = parsed(parser, arguments, FORMATS)
    results, about = run(options)
    print(report(results, about, options))
    if options.json:
        write_rounds(options.json, options.checkpoint, about, results)


if __name__ == "__main__":
    main()
