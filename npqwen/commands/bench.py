"""The command `npqwen bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import click

from npqwen.commands.loading import (
    Loading,
    bits_option,
    context_option,
    kv_option,
    low_disk_option,
    open_model,
    quiet_option,
    resolve,
    yarn_option,
)
from npqwen.commands.options import Command, Counts
from npqwen.terminal.terminal import Terminal

if TYPE_CHECKING:
    from npqwen.engine.cache_type import CacheType

_LENGTHS = Counts(0, "128,512")


@click.command(cls=Command)
@click.argument("model")
@click.option("--prefill", "-p", type=_LENGTHS, default="512", help="Prompt lengths, such as 512,4096; default: 512.")
@click.option("--decode", "-n", type=_LENGTHS, default="64", help="Numbers of tokens to generate; default: 64.")
@click.option("--depth", "-d", type=_LENGTHS, default="0", help="Tokens in the cache beforehand; default: 0.")
@click.option(
    "--repeat", "-r", type=click.IntRange(1), metavar="N", default=5, help="Measured runs of each; default: 5."
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@click.option(
    "--report",
    is_flag=False,
    flag_value="npqwen-bench.md",
    metavar="[FILE]",
    help="Also write a report to share, with machine and versions, nothing private; as JSON if FILE ends in .json. "
    "Default: npqwen-bench.md, with --report after MODEL.",
)
@bits_option
@click.option(
    "--threads",
    "-t",
    type=Counts(1, "1,2,4"),
    metavar="N,N",
    help="Numbers of threads, such as 1,2,4, each measured; default: one per core.",
)
@context_option
@yarn_option
@kv_option
@low_disk_option
@quiet_option
def bench(
    model: str,
    prefill: list[int],
    decode: list[int],
    depth: list[int],
    repeat: int,
    as_json: bool,
    report: str | None,
    bits: int | None,
    threads: list[int] | None,
    context: int | None,
    low_disk: bool,
    yarn: float | None,
    kv: CacheType | None,
    quiet: bool,
) -> None:
    """Measure tokens per second of MODEL, and the share of the memory's read bandwidth that decoding reaches."""
    path = None
    if report is not None:
        from pathlib import Path

        from npqwen.reports.machine_report import check_path

        path = check_path(Path(report))
    with Terminal(quiet=quiet) as terminal:
        converted = str(resolve(model, bits, terminal, low_disk=low_disk))

        from npqwen.engine.team import check_threads
        from npqwen.reports.bench import Report, benchmark
        from npqwen.reports.machine_report import collect, write

        for count in threads or ():
            check_threads(count)
        reports = []
        counts: Sequence[int | None] = threads or [None]
        for number in counts:
            loading = Loading(threads=number, context=context, yarn=yarn, kv=kv)
            with closing(open_model(converted, loading, terminal)) as loaded:
                progress = terminal.progress("measuring", " runs")
                reports.append(benchmark(loaded, prefill, decode, depth, repeat, progress=progress))
                speed = Report.merged(reports)
                facts = collect(loaded, speed)
        terminal.text((json.dumps(speed.as_dict(), indent=2) if as_json else speed.as_markdown()) + "\n")
        if path is not None:
            write(facts, path)
            terminal.notice(f"report written to {path}")
