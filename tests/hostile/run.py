#!/usr/bin/env python3
"""Run hostile cases, and print a table by category and the reproduction of each failure.

    python tests/hostile/run.py --cases 50000 [--seed 1] [--jobs 2] [--category configs ...]
    python tests/hostile/run.py --category configs --seed 1 --case 123 [--keep DIRECTORY]

A case is determined by its category, the seed and its number. The second form runs one in the foreground, with its own
output; --keep leaves its files there. The exit status is 1 if a case failed. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Made = TypeVar("Made")
TESTS = Path(__file__).resolve().parents[1]
if sys.path[0] == str(TESTS / "hostile"):  # run as a script: its neighbours are modules of the package
    sys.path[:1] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "quant")]
# A library's threads would not survive a fork, and hubs are out of reach.
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.environ.pop("RUST_BACKTRACE", None)

from hostile import (  # noqa: E402
    adapters,
    configs,
    headers,
    kernel_caches,
    kinds,
    quantized_files,
    saved,
    templates,
    texts,
    tokenizer_files,
    weights,
)
from hostile.bases import DENSE, SPARSE, make_bases  # noqa: E402
from hostile.case import Generator  # noqa: E402
from hostile.runner import Report, Runner, Work, run_case  # noqa: E402

GENERATORS: dict[str, tuple[Generator, float]] = {
    "kernel_caches": (kernel_caches.kernel_caches, 0.1),
    "configs": (configs.configs, 18),
    "other_files": (configs.other_files, 8),
    "headers": (headers.headers, 12),
    "indexes": (headers.indexes, 8),
    "tokenizers": (tokenizer_files.tokenizer_files, 10),
    "templates": (templates.templates, 10),
    "kinds": (kinds.kinds, 8),
    "sources": (weights.sources, 3),
    "units": (weights.units, 6),
    "ggufs": (quantized_files.ggufs, 6),
    "quantized": (quantized_files.quantized_checkpoints, 5),
    "compressed": (quantized_files.compressed_tensors, 4),
    "adapters": (adapters.adapters, 4),
    "conversations": (saved.conversations, 4),
    "sessions": (saved.sessions, 4),
    "prefix_caches": (saved.prefix_caches, 3),
    "texts": (texts.texts, 8),
    "command_lines": (texts.command_lines, 6),
}
"""Each category's generator and its share of all cases. Another kind of source is a function here, and a line."""


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=50_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; default: %(default)s")
    parser.add_argument("--category", action="append", choices=GENERATORS, help="only this one; may be repeated")
    parser.add_argument("--case", type=int, help="run one case of the category in the foreground")
    parser.add_argument("--keep", type=Path, help="a directory for that case's files, which must not exist")
    options = parser.parse_args()
    chosen = options.category or list(GENERATORS)
    if options.case is not None and len(chosen) != 1:
        parser.error("--case needs one --category")
    with tempfile.TemporaryDirectory(prefix="npqwen-hostile-", dir=_memory()) as made:
        scratch = Path(made).resolve()
        bases = scratch / "bases"
        bases.mkdir()
        runner = Runner({name: generator for name, (generator, _) in GENERATORS.items()}, bases, scratch)
        _import()
        if options.case is not None:
            _in_child(lambda: _make(bases))
            return _one(runner, Work(chosen[0], options.seed, options.case), options.keep or scratch / "case")
        works = _works(chosen, options.cases, options.seed)
        start = time.monotonic()
        warm = [work for work in works if work.category != "kernel_caches"]
        cold = [work for work in works if work.category == "kernel_caches"]
        reports = [_in_child(lambda: _made_and_run(runner, bases, warm, options.jobs))]
        reports.append(runner.run(cold, options.jobs, batch=1))  # a kernel that was loaded is not loaded again
        return _print(reports, time.monotonic() - start)


def _memory() -> str | None:
    """The directory of a file system in memory, which waits for no disk, if there is one with room."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > 4 << 30:
            return "/dev/shm"
    return None


def _made_and_run(runner: Runner, bases: Path, works: list[Work], jobs: int) -> Report:
    """Make the models, which loads all that commands need, and run cases on them."""
    _make(bases)
    return runner.run(works, jobs)


def _works(chosen: list[str], cases: int, seed: int) -> list[Work]:
    """The cases of the chosen categories, by their shares; at least one of each."""
    total = sum(GENERATORS[name][1] for name in chosen)
    counts = {name: max(1, int(cases * GENERATORS[name][1] / total)) for name in chosen}
    counts[max(chosen, key=lambda name: GENERATORS[name][1])] += max(0, cases - sum(counts.values()))
    return [Work(name, seed, number) for name, count in counts.items() for number in range(count)]


def _make(bases: Path) -> None:
    make_bases(bases)
    saved.make_saved(bases)
    quantized_files.make_quantized(bases)
    adapters.make_adapter(bases)
    _warm_up(bases)  # compiles what is not in the cache of kernels yet


def _in_child(work: Callable[[], Made]) -> Made:
    """What a function returns that runs in a child, so that this process loads no kernels."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(writer, "wb") as pipe:
                pickle.dump(work(), pipe)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        made = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the models could not be made, or the cases not be run")
    found: Made = pickle.loads(made)
    return found


def _import() -> None:
    """Import what commands import when they run, without loading a kernel."""
    import huggingface_hub  # noqa: F401
    import jinja2  # noqa: F401
    import npqwen_quant  # noqa: F401

    import npqwen.commands.cli
    import npqwen.hub
    import npqwen.model
    import npqwen.simd.isa  # noqa: F401


def _warm_up(bases: Path) -> None:
    """Run each command once on good models: everything is imported, compiled and loaded."""
    from npqwen.commands.cli import cli

    sink = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(1), os.dup(2)
    os.dup2(sink, 1), os.dup2(sink, 2)
    try:
        for name in (*DENSE, *SPARSE):
            model = str(bases / name)
            for line in (["generate", model, weights.LONG, "-n", "2", "-t", "2"], ["info", model]):
                cli.main(line, prog_name="npqwen", standalone_mode=False)
        for name, kv in ((name, kv) for name in ("dense-4", "mixture-4") for kv in ("int8", "f16", "f32")):
            line = ["generate", str(bases / name), weights.LONG, "-n", "2", "--kv", kv]
            cli.main(line, prog_name="npqwen", standalone_mode=False)
        line = ["chat", str(bases / "dense-4"), "What?", "-n", "1"]
        cli.main(line, prog_name="npqwen", standalone_mode=False)
        # `make_bases` has converted bfloat16 to all numbers of bits; FP8 stands for the formats that give float32.
        sources = [("fp8", bits) for bits in ("3", "8", "16")]
        sources += [(name, "4") for name in quantized_files.FORMATS]
        sources += [(f"gguf/{kind}.gguf", "4") for kind in quantized_files.KINDS]
        for name, bits in sources:
            line = ["convert", str(bases / name), str(bases / "warm"), "--bits", bits, "--force"]
            cli.main(line, prog_name="npqwen", standalone_mode=False)
        shutil.rmtree(bases / "warm")
    finally:
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        for descriptor in (sink, *kept):
            os.close(descriptor)


def _one(runner: Runner, work: Work, directory: Path) -> int:
    """Run one case in the foreground."""
    directory.mkdir(parents=True)
    os.chdir(directory)
    case = runner.work(work, directory.resolve())
    print(f"{work}: {case.label}\nnpqwen {' '.join(repr(arg)[:200] for arg in case.args)}", file=sys.stderr)
    if case.environment:
        print(f"environment: {dict(case.environment)}", file=sys.stderr)
    (directory / ".stdin").write_bytes(case.stdin)
    sys.stdin = open(directory / ".stdin", encoding="utf-8")  # noqa: SIM115
    os.environ.update(case.environment)
    status = run_case(case)
    print(f"exit status {status}", file=sys.stderr)
    os.chdir("/")
    return int(status not in case.statuses)


def _print(reports: list[Report], seconds: float) -> int:
    """Print the table and the failures; the exit status."""
    failures = [failure for report in reports for failure in report.failures]
    print(f"{'category':<16}{'cases':>8}{'status 0':>10}{'status 2':>10}{'failures':>10}{'ms of CPU':>11}")
    total = 0
    for report in reports:
        for name, count in report.counts.items():
            total += count
            zero, two = report.statuses[name, 0], report.statuses[name, 2]
            failed = sum(failure.work.category == name for failure in report.failures)
            print(f"{name:<16}{count:>8}{zero:>10}{two:>10}{failed:>10}{1000 * report.seconds[name] / count:>11.1f}")
    print(f"{'all':<16}{total:>8}{'':>20}{len(failures):>10}   in {seconds:.0f} s")
    for failure in failures:
        print(f"\n{failure.label[:300]!r}\n  {failure.problem[:600]}\n  python tests/hostile/run.py {failure.work}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
