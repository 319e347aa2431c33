"""The command `npqwen convert`."""

from __future__ import annotations

import click

from npqwen.commands.options import Command, check_numba, low_disk_option
from npqwen.format.recipe import CHOICES, DEFAULT_BITS
from npqwen.terminal.terminal import Terminal


@click.command(cls=Command)
@click.argument("source")
@click.argument("out", required=False)
@click.option(
    "--bits", type=int, default=DEFAULT_BITS, show_default=True, metavar="|".join(CHOICES), help="Bits per weight."
)
@click.option(
    "--calibrate",
    metavar="self|FILE|DIRECTORY",
    help="Lose less by error feedback (GPTQ), for a text: one that the model writes itself, or files. Takes minutes.",
)
@click.option("--force", is_flag=True, help="Replace a converted model that exists already.")
@low_disk_option
@click.option("--quiet", "-q", is_flag=True, help="No notices and no progress bars.")
def convert(
    source: str, out: str | None, bits: int, calibrate: str | None, force: bool, low_disk: bool, quiet: bool
) -> None:
    """Convert SOURCE, a checkpoint directory or a Hugging Face id, into the directory OUT.

    Without OUT, the result goes into the cache, where the other commands look for it. Its path is written to stdout.
    """
    from npqwen import hub

    check_numba()
    with Terminal(quiet=quiet) as terminal:
        calibration = None
        if calibrate is not None:
            from npqwen.commands.calibration import calibration_text

            calibration = calibration_text(calibrate, terminal)
        path = hub.convert(
            source,
            out,
            bits,
            force=force,
            low_disk=low_disk,
            notice=terminal.notice,
            progress=terminal.conversion_progress,
            download_bars=terminal.shows_bars,
            calibration=calibration,
            calibration_progress=terminal.calibration_progress,
        )
        terminal.text(f"{path}\n")
