"""The command `npqwen rm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from npqwen.checks import check_whole
from npqwen.commands.confirm import confirm, yes_option
from npqwen.commands.options import Command
from npqwen.errors import OptionError
from npqwen.format.recipe import CHOICES
from npqwen.terminal.terminal import Terminal
from npqwen.wording import counted, size

if TYPE_CHECKING:
    from npqwen.hub.downloads import Download
    from npqwen.hub.inventory import Conversion


@click.command(cls=Command)
@click.argument("known", nargs=-1, required=True, metavar="MODEL...")
@click.option("--bits", type=int, metavar="|".join(CHOICES), help="Only conversions to this many bits; default: all.")
@click.option("--download", is_flag=True, help="Remove the download, and keep the conversions.")
@click.option("--all", "everything", is_flag=True, help="Remove the conversions and the download.")
@yes_option
def rm(known: tuple[str, ...], bits: int | None, download: bool, everything: bool, yes: bool) -> None:
    """Remove converted models from the cache, or their downloads from huggingface_hub's cache.

    MODEL is a name in npqwen list. Programs that run a model which is removed are not disturbed (on Windows they have
    to be ended first). Checkpoints of your own are never removed.
    """
    if (bits is not None) + download + everything > 1:
        raise OptionError("--bits, --download and --all exclude each other; give one of them")

    from npqwen.cache_directory import cache_directory
    from npqwen.hub.downloads import downloads, remove_download
    from npqwen.hub.inventory import conversions
    from npqwen.hub.removal import remove
    from npqwen.hub.selection import select

    terminal = Terminal()
    converted, fetched = conversions(cache_directory()), downloads()
    doomed: dict[str, Conversion] = {}
    doomed_downloads: dict[str, Download] = {}
    left: dict[str, Download] = {}
    for model in known:
        found, found_downloads = select(model, converted, fetched)
        if not download:
            found = found if bits is None else _of_bits(model, found, bits)
            if not found and not everything:
                raise OptionError(f"{model} is not converted; npqwen rm --download {model} removes its download")
            doomed |= {str(one.path): one for one in found}
        elif not found_downloads:
            raise OptionError(f"{model} has no download; without --download, rm removes its conversions")
        (doomed_downloads if download or everything else left).update({one.model: one for one in found_downloads})
    _announce([*doomed.values()], [*doomed_downloads.values()], converted, terminal)
    if not confirm(f"Remove {_count(doomed, doomed_downloads)}?", yes, terminal):
        raise click.exceptions.Exit(1)
    for one in doomed.values():
        remove(one.path)
    for gone in doomed_downloads.values():
        remove_download(gone)
    terminal.notice(f"removed {_count(doomed, doomed_downloads)}")
    for kept in left.values():
        terminal.notice(f"its download, {size(kept.bytes)}, is kept; npqwen rm --download {kept.model} removes it")


def _of_bits(model: str, found: list[Conversion], bits: int) -> list[Conversion]:
    check_whole("bits", bits, 1)
    there = sorted({one.bits for one in found if one.bits is not None})
    chosen = [one for one in found if one.bits == bits]
    if found and not chosen:
        raise OptionError(f"{model} is not converted to {bits} bits, but to {', '.join(map(str, there))}")
    return chosen


def _announce(
    conversions: list[Conversion], downloads: list[Download], converted: list[Conversion], terminal: Terminal
) -> None:
    """Print what will be removed, one line each. converted: all existing conversions."""
    from npqwen.hub.disk_usage import freed_bytes
    from npqwen.reports.columns import columns
    from npqwen.reports.models import bits, name, use

    rows = [(name(one), f"{bits(one)} bits", size(freed_bytes([one.path])), one.stale or "") for one in conversions]
    rows += [(one.model, "download", size(one.bytes), use(one, converted)) for one in downloads]
    terminal.lines(columns(rows).rstrip("\n"))
    if downloads:
        terminal.lines("Other programs that use these downloads will have to download them again.")


def _count(conversions: dict[str, Conversion], downloads: dict[str, Download]) -> str:
    found = ((len(conversions), "conversion"), (len(downloads), "download"))
    return " and ".join(counted(count, noun) for count, noun in found if count)

