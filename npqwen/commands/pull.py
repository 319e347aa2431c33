"""The command `npqwen pull`."""

from __future__ import annotations

from pathlib import Path

import click

from npqwen.commands.loading import bits_option, low_disk_option, quiet_option, resolve
from npqwen.commands.options import Command
from npqwen.errors import OutOfMemoryError
from npqwen.terminal.terminal import Terminal
from npqwen.wording import size


@click.command(cls=Command)
@click.argument("model")
@bits_option
@low_disk_option
@quiet_option
def pull(model: str, bits: int | None, low_disk: bool, quiet: bool) -> None:
    """Download and convert MODEL ahead of its first use, and compile the kernels that it needs.

    The other commands do so, too, when they first need it. The path of the converted model is written to stdout. A
    model whose repository has not changed is neither downloaded nor converted again.
    """
    with Terminal(quiet=quiet) as terminal:
        path = resolve(model, bits, terminal, low_disk=low_disk)
        _compile(path, terminal)
        if not low_disk:
            _tell_of_download(path, terminal)
        terminal.text(f"{path}\n")


def _compile(path: Path, terminal: Terminal) -> None:
    """Compile the kernels of a converted model that are not in the cache; this machine may be too small to load it."""
    from npqwen.commands.compile_helper import CompileHelper
    from npqwen.model import load

    try:
        load(path, on_compile=CompileHelper(path, None, terminal.compilation_progress)).close()
    except OutOfMemoryError as error:
        terminal.notice(f"the kernels are not compiled: {error}")


def _tell_of_download(path: Path, terminal: Terminal) -> None:
    """Tell the user that the converted model's download is still in huggingface_hub's cache."""
    from npqwen.hub.downloads import downloads
    from npqwen.hub.names import repository_of
    from npqwen.hub.record import read

    known = read(path)
    for one in downloads():
        if known is not None and one.model == repository_of(known.model):
            terminal.notice(
                f"the download, {size(one.bytes)}, is not needed to run the model; npqwen rm --download {one.model} "
                "removes it"
            )
