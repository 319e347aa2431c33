"""The command `npqwen eval`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npqwen.commands.loading import (
    Loading,
    bits_option,
    low_disk_option,
    open_model,
    quiet_option,
    resolve,
    threads_option,
)
from npqwen.commands.options import Command
from npqwen.errors import OptionError
from npqwen.terminal.terminal import Terminal
from npqwen.text_file import read_text

if TYPE_CHECKING:
    from npqwen.model import Model

TEXT_BYTES = 16_000_000
"""Most bytes of a text: tokenizing takes a hundred times its size in memory."""
UNQUANTIZED = 16


@click.command(cls=Command)
@click.argument("model")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--against", metavar="MODEL", help="Compare with this model: a checkpoint or hub id is run in bf16.")
@click.option("--window", type=int, metavar="N", help="Tokens of a window; default: 512.")
@click.option(
    "--stride",
    type=int,
    metavar="N",
    help="Tokens from one window's start to the next one's; default: the window, without overlap.",
)
@click.option(
    "--prompts",
    type=int,
    default=32,
    show_default=True,
    metavar="N",
    help="With --against: prompts after which 16 greedy tokens are compared.",
)
@click.option("--layers", is_flag=True, help="With --against: also measure what each layer costs.")
@click.option("--store", is_flag=True, help="With --against: keep the result in MODEL's config.json, for info.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@click.option("--plot", metavar="FILE", help="Also draw a plot (.png, .svg, .pdf); needs matplotlib.")
@bits_option
@threads_option
@low_disk_option
@quiet_option
def eval(
    model: str,
    texts: tuple[str, ...],
    against: str | None,
    window: int | None,
    stride: int | None,
    prompts: int,
    layers: bool,
    store: bool,
    as_json: bool,
    plot: str | None,
    bits: int | None,
    threads: int | None,
    low_disk: bool,
    quiet: bool,
) -> None:
    """Measure how well MODEL predicts the text files TEXT: perplexity, and what quantizing it costs.

    A text is run in windows, each from an empty context. With --against, the models' distributions are compared: KL
    divergence, how often both have the same most likely token, and greedy continuations. - is the text on stdin.
    """
    if against is None and (layers or store):
        option = "--layers" if layers else "--store"
        raise OptionError(f"{option} needs a model to compare with; give one with --against")
    named = read_texts(texts)
    picture = None
    if plot is not None:
        from npqwen.reports.evaluation_plot import check_plot, draw

        picture = check_plot(Path(plot))
    with Terminal(quiet=quiet) as terminal, ExitStack() as opened:
        path, base_path = _resolve_both(model, against, bits, terminal, low_disk)

        def opened_model(path: Path) -> Model:
            return opened.enter_context(closing(open_model(str(path), Loading(threads=threads), terminal)))

        loaded = opened_model(path)
        base = None if base_path is None else opened_model(base_path)

        from npqwen.format.quantization import store_evaluation
        from npqwen.reports.evaluation import evaluate

        found = evaluate(
            loaded,
            named,
            base,
            window=window,
            stride=stride,
            prompts=prompts,
            layers=layers,
            progress=terminal.progress("evaluating", " tokens"),
        )
        found = replace(found, model=model, against=against)  # cache directories have no readable names
        terminal.text((json.dumps(found.as_dict(), indent=2) if as_json else found.as_markdown()) + "\n")
        if store:
            store_evaluation(path, found.as_record())
            terminal.notice(f"stored in {path / 'config.json'}")
        if picture is not None:
            draw(found, picture)
            terminal.notice(f"plot written to {picture}")


def read_texts(names: tuple[str, ...]) -> dict[str, str]:
    """The texts of some files, by their names; - is stdin. Raises OptionError for files that cannot be read as text."""
    found: dict[str, str] = {}
    for name in names:
        label = "stdin" if name == "-" else name
        if label in found:
            raise OptionError(f"{label} is given twice")
        found[label] = _read_text(name, label)
    return found


def _read_text(name: str, label: str) -> str:
    text = read_text(sys.stdin.buffer if name == "-" else name, label, TEXT_BYTES)
    if "\0" in text:
        raise OptionError(f"{label} is not text: it contains NUL bytes")
    if not text:
        raise OptionError(f"{label} is empty")
    return text


def _resolve_both(
    model: str, against: str | None, bits: int | None, terminal: Terminal, low_disk: bool
) -> tuple[Path, Path | None]:
    """The converted directories of both models, converted first if necessary."""
    from npqwen.format.quantization import is_converted
    from npqwen.hub.names import check_given

    if against is not None:
        check_given(against)
    path = resolve(model, bits, terminal, low_disk=low_disk)
    if against is None:
        return path, None
    converted = is_converted(Path(os.path.expanduser(against)))
    base = resolve(against, None if converted else UNQUANTIZED, terminal, low_disk=low_disk)
    if os.path.samefile(path, base):
        raise OptionError(f"{path} would be compared with itself; give another model with --against")
    return path, base
