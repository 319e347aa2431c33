"""The command `npqwen info`."""

from __future__ import annotations

import json

import click

from npqwen.commands.options import Command, check_numba
from npqwen.format.recipe import CHOICES
from npqwen.terminal.terminal import Terminal


@click.command(cls=Command)
@click.argument("model")
@click.option("--bits", type=int, metavar="|".join(CHOICES), help="Bits per weight, if not converted yet.")
@click.option(
    "--context", type=int, metavar="N", help="Count memory for N tokens; default: the model's limit."
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def info(model: str, bits: int | None, context: int | None, as_json: bool) -> None:
    """Describe MODEL: shapes, bits per weight, bytes of each part, memory needed, and the kernels that will run.

    Like the other commands, this downloads and converts the model first if necessary.
    """
    from npqwen import hub
    from npqwen.reports.info import describe, inspect

    check_numba()
    with Terminal() as terminal:
        path = hub.resolve(
            model,
            bits,
            notice=terminal.notice,
            progress=terminal.conversion_progress,
            download_bars=terminal.shows_bars,
        )
        found = inspect(path, context)
        terminal.text((json.dumps(found.as_dict(), indent=2) if as_json else describe(found)) + "\n")
