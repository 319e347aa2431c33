"""The command `npqwen list`."""

from __future__ import annotations

import json

import click

from npqwen.commands.options import Command
from npqwen.terminal.terminal import Terminal


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def list(as_json: bool) -> None:
    """List the converted models in the cache, and the checkpoints that were downloaded for them.

    A converted model runs without its download, which is needed only to convert it to other bits.
    """
    from npqwen.cache_directory import cache_directory
    from npqwen.hub.downloads import downloads
    from npqwen.hub.inventory import conversions
    from npqwen.reports.models import as_dict, describe

    found = conversions(cache_directory()), downloads()
    Terminal().text(json.dumps(as_dict(*found), indent=2) + "\n" if as_json else describe(*found))
