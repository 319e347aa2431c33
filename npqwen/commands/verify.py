"""The command `npqwen verify`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from npqwen.commands.options import Command
from npqwen.errors import FormatError, ModelNotFoundError
from npqwen.terminal.terminal import Terminal


@click.command(cls=Command)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
def verify(models: tuple[str, ...], quiet: bool) -> None:
    """Read all of MODEL, and check that it is still what was converted.

    MODEL is a converted directory, or a name in npqwen list, which stands for all of its conversions. Every tensor is
    compared with the checksum that its conversion stored. Damaged tensors are reported by file and name, with exit
    status 2.
    """
    from npqwen.reports.verification import verify as verified

    with Terminal(quiet=quiet) as terminal:
        places = {path: advice for model in models for path, advice in _converted(model).items()}
        damaged = []
        for path in places:
            found = verified(path, terminal.progress("verifying"))
            terminal.clear_bar()
            terminal.text(found.describe() + "\n")
            if found.damage:
                damaged.append(path)
        if damaged:
            ways = list(dict.fromkeys(places[path] for path in damaged))
            what = f"{damaged[0]} is" if len(damaged) == 1 else f"{len(damaged)} of {len(places)} models are"
            raise FormatError(f"{what} damaged; {'; '.join(ways)}")


def _converted(model: str) -> dict[Path, str]:
    """The converted directories that a name refers to, and what to do if one is damaged."""
    from npqwen.cache_directory import cache_directory
    from npqwen.format.quantization import is_converted
    from npqwen.hub.downloads import downloads
    from npqwen.hub.inventory import conversions
    from npqwen.hub.names import check_given
    from npqwen.hub.selection import select

    check_given(model)
    path = Path(os.path.expanduser(model))
    if is_converted(path):
        return {path: f"convert its checkpoint again (npqwen convert CHECKPOINT {shlex.quote(model)} --force)"}
    converted, fetched = select(model, conversions(cache_directory()), downloads())
    found = {
        one.path: f"convert it again: npqwen convert {shlex.quote(one.model)} --bits {one.bits} --force"
        for one in converted
    }
    for one in fetched:
        again = f"download it again, after npqwen rm --download {shlex.quote(one.model)}"
        found |= {place: again for place in one.path.glob("snapshots/*") if is_converted(place)}
    if not found:
        raise ModelNotFoundError(f"{model} was downloaded, but not converted; only converted models have checksums")
    return found
