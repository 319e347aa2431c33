"""The command `npqwen doctor`."""

from __future__ import annotations

import json

import click

from npqwen.commands.options import Command
from npqwen.terminal.terminal import Terminal

SOME_PROBLEM = 1


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def doctor(as_json: bool) -> None:
    """Examine this machine: what it has, which models run how fast, and whether the caches are sound.

    The speeds are estimated from the memory's bandwidth, which is measured. Of compiled kernels every byte
    is checked, of converted models all but the weights, which npqwen verify reads. Nothing is changed. Exit status 1:
    problems were found; each is listed with a remedy.
    """
    from npqwen.reports.doctor import examine

    found = examine()
    Terminal().text(json.dumps(found.as_dict(), indent=2) + "\n" if as_json else found.describe())
    if not found.is_well:
        raise click.exceptions.Exit(SOME_PROBLEM)
