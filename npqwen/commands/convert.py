"""The command `npqwen convert`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npqwen.commands.loading import low_disk_option
from npqwen.commands.options import Command, argument_text
from npqwen.errors import NpqwenError, OptionError
from npqwen.format.recipe import CHOICES, DEFAULT_BITS
from npqwen.terminal.signals import tidied_up
from npqwen.terminal.terminal import Terminal, one_line

if TYPE_CHECKING:
    from npqwen_quant.adapter import AdapterFile

    from npqwen.commands.calibration import FileText, OwnText


@click.command(cls=Command)
@click.argument("source")
@click.argument("out", required=False)
@click.option(
    "--bits", type=int, default=DEFAULT_BITS, show_default=True, metavar="|".join(CHOICES), help="Bits per weight."
)
@click.option(
    "--calibrate",
    metavar="self|FILE|DIRECTORY",
    help="Lose less by error feedback (GPTQ) on a text: one that the model writes itself, or files. Takes minutes.",
)
@click.option(
    "--evaluate",
    metavar="self|FILE|DIRECTORY",
    help="Measure the divergence from SOURCE on this text, and store it for info; default with --calibrate: on a part "
    "of the text that is held out, at most 2048 tokens.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR[:SCALE]",
    help="Merge a LoRA adapter that PEFT saved, its effect multiplied by SCALE; may be repeated.",
)
@click.option("--no-evaluate", is_flag=True, help="Measure nothing.")
@click.option("--force", is_flag=True, help="Replace a converted model that exists already.")
@low_disk_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only report sizes, memory, download, disk space and time; downloads no weights and writes nothing.",
)
@click.option("--quiet", "-q", is_flag=True, help="No notices and no progress bars.")
def convert(
    source: str,
    out: str | None,
    bits: int,
    calibrate: str | None,
    evaluate: str | None,
    adapters: tuple[str, ...],
    no_evaluate: bool,
    force: bool,
    low_disk: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Convert SOURCE, a checkpoint directory, a GGUF file or a Hugging Face id, into the directory OUT.

    Without OUT, the result goes into the cache, where the other commands look for it. Its path is written to stdout.
    After an interruption, the same command resumes the conversion.
    """
    from npqwen import hub
    from npqwen.format.adapter import AdapterFile, StoredAdapter

    if evaluate is not None and no_evaluate:
        raise OptionError("--evaluate and --no-evaluate exclude each other; give one of them")
    merged = [AdapterFile.parse(argument_text(adapter)) for adapter in adapters]
    for file in merged:  # before anything is downloaded
        StoredAdapter(file)
    with tidied_up(), Terminal(quiet=quiet) as terminal:
        if dry_run:
            from npqwen.reports.conversion_plan import plan_conversion

            plan = plan_conversion(
                source,
                out,
                bits,
                low_disk=low_disk,
                calibrated=calibrate is not None,
                adapters=merged,
                notice=terminal.notice,
            )
            terminal.text(plan.describe() + "\n")
            return
        text = measured = None
        if calibrate is not None or evaluate is not None:
            from npqwen.commands.calibration import text_named

            text = None if calibrate is None else text_named(calibrate, terminal)
            measured = text if evaluate in (None, calibrate) else text_named(str(evaluate), terminal)
        path = hub.convert(
            source,
            out,
            bits,
            force=force,
            low_disk=low_disk,
            notice=terminal.notice,
            progress=terminal.progress("converting"),
            download_bars=terminal.shows_bars,
            calibration=None if text is None else text.calibration,
            calibration_progress=terminal.progress("calibrating"),
            adapters=merged,
            measure=None
            if measured is None or no_evaluate
            else _measurement(measured, measured is text, merged, terminal),
        )
        terminal.text(f"{path}\n")


def _measurement(
    text: OwnText | FileText, calibrated: bool, adapters: Sequence[AdapterFile], terminal: Terminal
) -> Callable[[Path, Path], None]:
    """A function that measures a conversion on a text and stores the result. If that fails, it says why.

    calibrated: the model was calibrated with the same text. adapters: those that were merged.
    """

    def measure(source: Path, converted: Path) -> None:
        try:
            measure_and_store(source, converted)
        except NpqwenError as error:  # the conversion itself is complete
            terminal.lines(f"converted, but not measured: {one_line(str(error))}", dim=True)

    def measure_and_store(source: Path, converted: Path) -> None:
        from npqwen.format.quantization import store_evaluation
        from npqwen.model import load
        from npqwen.reports.checkpoint_evaluation import evaluate_conversion
        from npqwen.reports.info import evaluation_line

        terminal.notice("converted; now the divergence from the checkpoint is measured")
        with closing(load(converted, on_compile=terminal.compilation_progress)) as model:
            name, ids = text.to_measure(model, calibrated)
            if not len(ids):
                terminal.notice(
                    "nothing is measured: the text is too short to hold a part out; give another one with --evaluate"
                )
                return
            record = evaluate_conversion(model, source, ids, name, terminal.progress("evaluating", " tokens"), adapters)
        store_evaluation(converted, record)
        terminal.notice(evaluation_line(record))

    return measure
