"""The command `npqwen bench`."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import click

from npqwen.commands.options import Command, model_options, open_model
from npqwen.terminal.terminal import Terminal


class _Counts(click.ParamType):  # type: ignore[type-arg]
    """Numbers of tokens, separated by commas."""

    name = "N,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 128,512", param, ctx)


@click.command(cls=Command)
@click.argument("model")
@click.option("--prefill", type=_Counts(), default="512", show_default=True, help="Prompt lengths, such as 512,4096.")
@click.option("--decode", type=_Counts(), default="64", show_default=True, help="Numbers of tokens to generate.")
@click.option("--depth", type=_Counts(), default="0", show_default=True, help="Tokens in the cache beforehand.")
@click.option("--repeat", type=int, default=5, show_default=True, help="Measured runs of each.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@click.option(
    "--report",
    is_flag=False,
    flag_value="npqwen-bench.md",
    metavar="[FILE]",
    help="Also write a report to share, with machine and versions, nothing private; as JSON if FILE ends in .json. "
    "Default: npqwen-bench.md, with --report after MODEL.",
)
@model_options
def bench(
    model: str,
    prefill: list[int],
    decode: list[int],
    depth: list[int],
    repeat: int,
    as_json: bool,
    report: str | None,
    bits: int | None,
    threads: int | None,
    context: int | None,
    yarn: float | None,
    quiet: bool,
) -> None:
    """Measure tokens per second of MODEL, and the share of the memory's read bandwidth that decoding reaches."""
    path = None
    if report is not None:
        from pathlib import Path

        from npqwen.reports.machine_report import check_path

        path = check_path(Path(report))
    with (
        Terminal(quiet=quiet) as terminal,
        closing(open_model(model, bits, threads, context, terminal, yarn)) as loaded,
    ):
        from npqwen.reports.bench import benchmark
        from npqwen.reports.machine_report import collect, write

        speed = benchmark(loaded, prefill, decode, depth, repeat, progress=terminal.benchmark_progress)
        terminal.text((json.dumps(speed.as_dict(), indent=2) if as_json else speed.as_markdown()) + "\n")
        if path is not None:
            write(collect(loaded, speed), path)
            terminal.notice(f"report written to {path}")
