"""The command `npqwen cache`, and `npqwen cache prune`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from npqwen.commands.confirm import confirm, yes_option
from npqwen.commands.options import Command
from npqwen.terminal.terminal import Terminal
from npqwen.wording import size

if TYPE_CHECKING:
    from npqwen.hub.leftovers import Leftover


class _Group(Command, click.Group):
    """A group of commands with hints for wrong options."""


@click.group(cls=_Group, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@click.pass_context
def cache(ctx: click.Context, as_json: bool) -> None:
    """Show where the cache is, what it contains, and how large it is.

    It holds conversions, compiled kernels, and conversations with their history. NPQWEN_CACHE names another directory
    for it. Downloads are in huggingface_hub's own cache (HF_HOME).
    """
    if ctx.invoked_subcommand is not None:
        return
    from npqwen.cache_directory import cache_directory
    from npqwen.hub.downloads import downloads
    from npqwen.hub.leftovers import leftovers
    from npqwen.reports.cache import Usage

    root = cache_directory()
    usage = Usage.of(root, leftovers(root), downloads())
    Terminal().text(json.dumps(usage.as_dict(), indent=2) + "\n" if as_json else usage.describe())


@cache.command(cls=Command)
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@yes_option
def prune(dry_run: bool, yes: bool) -> None:
    """Remove from the cache what will not be used again.

    That is: conversions that a newer one has replaced, of an older format, or of a checkpoint that is gone; remains of
    interrupted conversions; kernels of other versions or processors. Downloads stay (npqwen rm --download).
    """
    from npqwen.cache_directory import cache_directory
    from npqwen.hub.disk_usage import freed_bytes
    from npqwen.hub.leftovers import leftovers, remove_leftover

    terminal, root = Terminal(), cache_directory()
    found = leftovers(root)
    if not found:
        terminal.lines(f"nothing to remove in {root}")
        return
    total = size(freed_bytes([one.path for one in found]))
    terminal.lines(_table(found))
    if dry_run:
        terminal.lines(f"{total} would be freed")
        return
    if not confirm(f"Remove these, {total}?", yes, terminal):
        raise click.exceptions.Exit(1)
    kept = [one for one in found if not remove_leftover(one)]
    for one in kept:
        terminal.lines(f"{one.path} is kept: it is in use again")
    terminal.lines(f"removed {len(found) - len(kept)} of {len(found)}" if kept else f"{total} freed")


def _table(found: list[Leftover]) -> str:
    from npqwen.hub.disk_usage import freed_bytes
    from npqwen.reports.columns import columns

    return columns([(size(freed_bytes([one.path])), one.reason) for one in found]).rstrip("\n")
