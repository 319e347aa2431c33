"""The command `npqwen pull`."""

from __future__ import annotations

import click

from npqwen.commands.options import Command, bits_option, low_disk_option, quiet_option, resolve
from npqwen.terminal.terminal import Terminal


@click.command(cls=Command)
@click.argument("model")
@bits_option
@low_disk_option
@quiet_option
def pull(model: str, bits: int | None, low_disk: bool, quiet: bool) -> None:
    """Download and convert MODEL ahead of its first use.

    The other commands do so, too, when they first need it. The path of the converted model is written to stdout. A
    model whose repository has not changed is neither downloaded nor converted again.
    """
    with Terminal(quiet=quiet) as terminal:
        terminal.text(f"{resolve(model, bits, terminal, low_disk=low_disk)}\n")
